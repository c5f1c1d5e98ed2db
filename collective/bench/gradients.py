"""The workload `resnet50`: the 161 gradients of ResNet-50, 102 MB, all ready at once and then all reduced."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .buffers import Buffer, Slab, check
from .job import Job, has_torch
from .peers import OURS, Contender
from .resnet50 import gradient_shapes
from .results import Result
from .timing import Run, measure

__all__ = ["BUCKETS", "VIEWS", "gradients"]

BUCKETS = f"{OURS} buckets"
"""The gradients by way of DistributedOptimizer, with copies to buckets and back."""

VIEWS = f"{OURS} views"
"""The same with gradients that are views of buckets."""


def gradients(job: Job, peers: Sequence[Contender], rounds: int) -> list[Result]:
    """Reduce the gradients in the order in which backward produces them.

    Ours and gloo start 161 asynchronous operations and then wait for all; MPI makes 161 blocking calls, and memcpy
    161 copies; "ours buckets" is what the optimizer wrapper does before a step: gradients into its buckets and back;
    "ours views" is the same when they are in the buckets already.
    """
    job.progress("resnet50")
    shapes = gradient_shapes()[::-1]
    sizes = [4 * math.prod(shape) for _, shape in shapes]
    buffers = _cut(sizes)
    runs: dict[str, Run] = {}
    for peer in peers:
        if not peer.one_place and any(peer.takes("float32", size) for size in sizes):
            runs[peer.name] = _repeat(peer, buffers)
            if peer.sums:
                arrays = [buffer.array for buffer in buffers]
                check(arrays, runs[peer.name], job.rank, job.size, f"resnet50, {peer.name}")
        if peer.name == OURS and has_torch():
            from .reduction import Reduction

            for name in (BUCKETS, VIEWS):
                reduction = Reduction(gradient_shapes(), name == VIEWS)
                runs[name] = reduction.run
                check(reduction.arrays(), reduction.run, job.rank, job.size, f"resnet50, {name}")
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
