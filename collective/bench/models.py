"""The networks that are trained for the step and overlap workloads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .resnet50 import STAGES

__all__ = ["ResNet50", "WaitingModel"]


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, with the input added around them; the 3x3 has the stride."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if inputs != outputs
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 for images with 3 channels, at least 32 pixels a side; 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, (blocks, width) in enumerate(STAGES, 1):
            layer = nn.Sequential()
            for block in range(blocks):
                layer.append(_Bottleneck(inputs, width, 2 if block == 0 and stage > 1 else 1))
                inputs = 4 * width
            self.add_module(f"layer{stage}", layer)
        self.fc = nn.Linear(inputs, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)
        for stage in range(1, len(STAGES) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class _Wait(torch.autograd.Function):
    """Identity whose backward waits, then hands out gradients that it holds already."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, seconds: float, gradients: list[torch.Tensor], *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.seconds, ctx.gradients = seconds, gradients
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        time.sleep(ctx.seconds)
        return (grads[0], None, None, *ctx.gradients)


class WaitingModel(nn.Module):
    """A network whose backward takes `seconds`, and CPU only to store gradients, as if a device computed them.

    Args:
        layers: the shapes of each layer's parameters; backward waits as long in every layer.
        seconds: the time of one backward pass.
        gradient: the value of every gradient.
    """

    def __init__(self, layers: Sequence[Sequence[tuple[int, ...]]], seconds: float, gradient: float) -> None:
        super().__init__()
        self._wait = seconds / len(layers)
        self.layers = nn.ModuleList(nn.ParameterList(torch.zeros(s) for s in shapes) for shapes in layers)
        self._gradients = [[torch.full(s, gradient) for s in shapes] for shapes in layers]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, gradients in zip(self.layers, self._gradients, strict=True):
            x = _Wait.apply(x, self._wait, gradients, *layer.parameters())  # type: ignore[no-untyped-call]
        return x
