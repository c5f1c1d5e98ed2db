"""The workload `resnet50`: the 161 gradients of ResNet-50, 102 MB, all there at once and then all reduced."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .buffers import Buffer, Slab
from .job import Job, has_torch
from .peers import OURS, Contender
from .resnet50 import gradient_shapes
from .results import Result
from .timing import Run, measure

__all__ = ["BUCKETS", "gradients"]

BUCKETS = f"{OURS} buckets"
"""The gradients by way of DistributedOptimizer.synchronize()."""


def gradients(job: Job, peers: Sequence[Contender], rounds: int) -> list[Result]:
    """Reduce the gradients in the order in which backward produces them.

    Ours and gloo start 161 asynchronous operations and then wait for all; MPI makes 161 blocking calls, and memcpy
    161 copies; "ours buckets" is the optimizer wrapper's `synchronize()`, which copies gradients into its buckets
    and back.
    """
    job.progress("resnet50")
    shapes = gradient_shapes()[::-1]
    sizes = [4 * math.prod(shape) for _, shape in shapes]
    buffers = _cut(sizes)
    runs: dict[str, Run] = {}
    for peer in peers:
        if any(peer.takes("float32", size) for size in sizes):
            runs[peer.name] = _repeat(peer, buffers)
        if peer.name == OURS and has_torch():
            runs[BUCKETS] = _synchronize(shapes)
    samples = measure(job, runs, rounds)
    case = f"{len(sizes)} tensors, {sum(sizes) / 1e6:.0f} MB"
    return [Result("resnet50", case, name, samples[name].wall, nbytes=sum(sizes)) for name in runs]


def _cut(sizes: Sequence[int]) -> list[Buffer]:
    """A buffer of each size, one after the other, as an allocator would place them."""
    align = 64
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // align) * align)
    slab = Slab(starts[-1])
    return [slab.at("float32", size, start) for size, start in zip(sizes, starts, strict=False)]


def _repeat(peer: Contender, buffers: Sequence[Buffer]) -> Run:
    call = peer.bind_all(buffers)

    def run(count: int) -> None:
        for _ in range(count):
            call()

    return run


def _synchronize(shapes: Sequence[tuple[str, tuple[int, ...]]]) -> Run:
    import torch

    from .. import torch as hvd

    parameters = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in reversed(shapes)]
    for _, parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    sgd = torch.optim.SGD([parameter for _, parameter in parameters], lr=0.0)
    optimizer = hvd.DistributedOptimizer(sgd, named_parameters=parameters, op=hvd.Sum)

    def run(count: int) -> None:
        for _ in range(count):
            optimizer.synchronize()  # type: ignore[attr-defined]

    return run
