"""The gradients of ResNet-50 (He et al., 2016): what an all-reduce for training has to carry, without torch."""

from __future__ import annotations

from itertools import pairwise

__all__ = ["STAGES", "gradient_shapes"]

STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
"""For each stage, the number of bottleneck blocks and their width."""

Shape = tuple[int, ...]


def _convolution(name: str, norm: str, inputs: int, outputs: int, kernel: int) -> list[tuple[str, Shape]]:
    """A convolution without bias and the batch normalisation that follows it."""
    return [
        (f"{name}.weight", (outputs, inputs, kernel, kernel)),
        (f"{norm}.weight", (outputs,)),
        (f"{norm}.bias", (outputs,)),
    ]


def gradient_shapes(classes: int = 1000) -> list[tuple[str, Shape]]:
    """Names and shapes in the order of forward: 161 tensors of 25,557,032 elements for 1000 classes."""
    shapes = _convolution("conv1", "bn1", 3, 64, 7)
    inputs = 64
    for stage, (blocks, width) in enumerate(STAGES, 1):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            channels = [inputs, width, width, 4 * width]
            for number, (before, after) in enumerate(pairwise(channels), 1):
                kernel = 3 if number == 2 else 1
                shapes += _convolution(f"{prefix}.conv{number}", f"{prefix}.bn{number}", before, after, kernel)
            if block == 0:
                shapes += _convolution(f"{prefix}.downsample.0", f"{prefix}.downsample.1", inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, ("fc.weight", (classes, inputs)), ("fc.bias", (classes,))]
