"""The workload `devices`: the kernels by themselves, and all-reduces of arrays on devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .. import _core, ops, runtime
from ..devices import prepare
from . import c10d
from .job import Job, has_torch
from .peers import OURS
from .resnet50 import gradient_shapes
from .results import Result
from .sizes import format_bytes
from .timing import Run, measure

__all__ = ["COPY", "KERNELS", "devices"]

KERNELS = "kernels"
"""The name of their results."""

COPY = "copy"
"""The case that they are compared with: a copy on the device."""

_REDUCED = 64 << 20  # bytes of each source
_CALLS = 5


def devices(job: Job, sizes: Sequence[int], rounds: int, peers: Sequence[str]) -> list[Result]:
    """Measure both, on CuPy arrays; a rank takes the device of its local rank. Without a device, only leave a note."""
    names, why_none = _core.devices()
    if not names:
        job.note(f"devices: {why_none}")
        return []
    try:
        import cupy
    except ImportError as error:
        job.note(f"devices: CuPy cannot be imported: {error}")
        return []
    number = runtime.local_rank() % len(names)
    job.note(f"devices: {names[number][0]} on rank 0; {len(names)} of them for {job.local_size} ranks of its node")
    with cupy.cuda.Device(number):
        prepare(number)
        results = []
        job.progress("devices, kernels")
        if job.rank == 0:  # alone on its device
            results += _kernels(cupy, number, rounds)
        job.comm.Barrier()
        for nbytes in sizes:
            job.progress(f"devices, {format_bytes(nbytes)}")
            results += _allreduce(job, cupy, max(nbytes // 4, 1) * 4, rounds, peers)
    return results


def _kernels(cupy: Any, number: int, rounds: int) -> list[Result]:
    """Times, by events, of back-to-back calls on one stream; bytes are those read and written."""
    stream = cupy.cuda.get_current_stream().ptr
    counts = [math.prod(shape) for _, shape in gradient_shapes()]
    total = sum(counts)
    float32, float16 = _core.DType.float32, _core.DType.float16
    gradients = [cupy.zeros((count,), dtype="float32") for count in counts]
    bucket = cupy.zeros((total,), dtype="float32")
    places = [bucket.data.ptr + 4 * sum(counts[:i]) for i in range(len(counts))]
    halves = [bucket.data.ptr + 2 * sum(counts[:i]) for i in range(len(counts))]
    pointers = [x.data.ptr for x in gradients]
    a, b = (cupy.zeros((_REDUCED // 4,), dtype="float32") for _ in range(2))
    convert = partial(_core.queue_convert, number, stream)
    reduce = partial(_core.queue_reduce, number, stream)
    one_source = _REDUCED // 4
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        f"{COPY} {format_bytes(_REDUCED)}": (2 * _REDUCED, lambda: cupy.copyto(b, a)),
        "pack 161 gradients": (8 * total, partial(convert, float32, float32, _pieces(pointers, places, counts), 1.0)),
        "pack to float16": (6 * total, partial(convert, float16, float32, _pieces(pointers, halves, counts), 0.5)),
        "unpack from float16": (6 * total, partial(convert, float32, float16, _pieces(halves, pointers, counts), 1.0)),
    }
    sources, target = [a.data.ptr, b.data.ptr], [b.data.ptr]
    for dtype in (float32, float16, _core.DType.bfloat16):
        count = one_source * (1 if dtype == float32 else 2)
        run = partial(reduce, dtype, _core.ReduceOp.Sum, sources, target, count, 0.5)
        calls[f"sum of two, {dtype.name}"] = (3 * _REDUCED, run)
    results = []
    for case, (nbytes, call) in calls.items():
        call()
        samples = []
        for _ in range(rounds):
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record()
            for _ in range(_CALLS):
                call()
            end.record()
            end.synchronize()
            samples.append(cupy.cuda.get_elapsed_time(begin, end) / 1e3 / _CALLS)
        results.append(Result(KERNELS, case, OURS, samples, nbytes=nbytes))
    return results


def _pieces(sources: Sequence[int], targets: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int, int]]:
    return list(zip(sources, targets, counts, strict=True))


def _allreduce(job: Job, cupy: Any, nbytes: int, rounds: int, peers: Sequence[str]) -> list[Result]:
    """Blocking calls: ours; by way of the host, as a user would write without ours; gloo, on a torch tensor."""
    import cupyx
    from mpi4py import MPI

    x = cupy.full((nbytes // 4,), job.rank + 1, dtype="float32")
    host = cupyx.empty_pinned(nbytes // 4, dtype=np.float32)

    def by_way_of_the_host() -> None:
        x.get(out=host)
        job.comm.Allreduce(MPI.IN_PLACE, [host, MPI.FLOAT], MPI.SUM)
        x.set(host)
        cupy.cuda.get_current_stream().synchronize()

    calls: dict[str, Callable[[], object]] = {
        OURS: partial(ops.allreduce_, x, ops.Sum, name=f"bench.device.{nbytes}"),
        f"{OURS} fp16": partial(ops.allreduce_, x, ops.Sum, name=f"bench.device.fp16.{nbytes}", compression="fp16"),
    }
    if "mpi" in peers:
        calls["host + mpi"] = by_way_of_the_host
    if "gloo" in peers and _torch_has_devices() and c10d.connect(job):
        import torch
        import torch.distributed as dist

        tensor = torch.zeros(nbytes // 4, device=f"cuda:{x.device.id}")

        def by_gloo() -> None:
            dist.all_reduce(tensor)
            torch.cuda.synchronize(tensor.device)

        calls["gloo"] = by_gloo
    total = job.size * (job.size + 1) / 2
    for name, call in calls.items():
        if name == "gloo":
            continue
        x.set(np.full(nbytes // 4, job.rank + 1, np.float32))
        call()
        if not (x.get() == total).all():
            raise ArithmeticError(f"devices, {format_bytes(nbytes)}, {name}: a sum over {job.size} ranks is wrong")
    x.set(np.zeros(nbytes // 4, np.float32))
    samples = measure(job, {name: _repeat(call) for name, call in calls.items()}, rounds)
    return [Result("devices", format_bytes(nbytes), name, samples[name].wall, nbytes=nbytes) for name in calls]


def _repeat(call: Callable[[], object]) -> Run:
    def run(count: int) -> None:
        for _ in range(count):
            call()

    return run


def _torch_has_devices() -> bool:
    if not has_torch():
        return False
    import torch

    return torch.cuda.is_available()
