"""What is profiled and measured: a model, its optimizer, and a loss; built in, or from a module of the user's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ..bench.models import ResNet50, WaitingModel
from ..bench.resnet50 import gradient_shapes

__all__ = ["BUILT_IN", "Training", "find"]


class Training(NamedTuple):
    """What a training step needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], torch.Tensor]
    """Runs forward on some batch and returns the loss, a scalar."""


def _mlp() -> Training:
    """A network of four layers and 2 MB, for a quick try."""
    model = nn.Sequential(
        *(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()),
        *(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)),
    )
    return _classifier(model, torch.randn(32, 64), 10)


def _resnet50() -> Training:
    """ResNet-50, 102 MB, a batch of four images of 64 x 64."""
    return _classifier(ResNet50(), torch.randn(4, 3, 64, 64), 1000)


def _waiting() -> Training:
    """The parameters of ResNet-50, but a backward that sleeps for half a second, as if a device computed it."""
    layers = [[shape] for _, shape in gradient_shapes()]
    model = WaitingModel(layers, seconds=0.5, gradient=1e-3)
    x = torch.ones(1)
    return Training(model, torch.optim.SGD(model.parameters(), lr=1e-3), lambda: model(x).sum())


def _classifier(model: nn.Module, batch: torch.Tensor, classes: int) -> Training:
    labels = torch.randint(classes, (len(batch),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    return Training(model, optimizer, lambda: functional.cross_entropy(model(batch), labels))


BUILT_IN: dict[str, Callable[[], Training]] = {"resnet50": _resnet50, "waiting": _waiting, "mlp": _mlp}


def find(text: str) -> Callable[[], Training]:
    """What makes the training of this name, or `module:callable`; raises ValueError if there is none."""
    if text in BUILT_IN:
        return BUILT_IN[text]
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise ValueError(f"{text!r} is neither of {', '.join(BUILT_IN)} nor module:callable")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{text!r}: {error}") from error
    made = getattr(module, name, None)
    if not callable(made):
        raise ValueError(f"{text!r}: {module_name} has no callable {name!r}")

    def make() -> Training:
        parts = made()
        if not isinstance(parts, tuple) or len(parts) != 3:
            raise ValueError(f"{text!r} returned {type(parts).__name__}, not (model, optimizer, loss)")
        training = Training(*parts)
        kinds = (nn.Module, torch.optim.Optimizer)
        if not all(isinstance(part, kind) for part, kind in zip(training, kinds, strict=False)):
            raise ValueError(f"{text!r} did not return (model, optimizer, loss), but other things")
        if not callable(training.loss):
            raise ValueError(f"{text!r}: the loss it returned is not callable")
        return training

    return make
