"""The workloads `latency` and `bandwidth`: one blocking all-reduce, at every size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice, repeat

from .buffers import DTYPES, Buffer, Slab, cache_bytes, check
from .job import Job
from .peers import Contender
from .results import Result
from .timing import Run, measure

__all__ = ["LATENCY_BYTES", "bandwidth", "bind", "format_bytes", "latency", "whole"]

LATENCY_BYTES = 16 << 10
"""Up to this size a call's time is called latency: what counts is its fixed cost."""

# Buffers that were used this many cache sizes ago, by all ranks of the node together, are no longer in the cache.
_COLD_CACHES = 4


def format_bytes(nbytes: int) -> str:
    """8 B, 4 KiB, 1.5 MiB."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.4g} {unit}"
    return f"{nbytes} B"


def latency(
    job: Job, peers: Sequence[Contender], sizes: Sequence[int], dtypes: Sequence[str], rounds: int
) -> list[Result]:
    """The sizes up to LATENCY_BYTES, in buffers that stay in the cache."""
    results = []
    slab = Slab(LATENCY_BYTES)
    for dtype in dtypes:
        for nbytes in whole(sizes, dtype, 0, LATENCY_BYTES):
            case = f"{format_bytes(nbytes)}{_suffix(dtype)}"
            job.progress(f"latency, {case}")
            results += _measure(job, peers, "latency", case, [slab.at(dtype, nbytes, 0)], rounds, cold=False)
    return results


def bandwidth(
    job: Job, peers: Sequence[Contender], sizes: Sequence[int], dtypes: Sequence[str], rounds: int
) -> list[Result]:
    """The sizes above LATENCY_BYTES: warm, in one buffer again and again, and cold, in many by turns.

    Sizes at which a single buffer is larger than the cache are always cold, and measured once.
    """
    results = []
    rotated = _COLD_CACHES * cache_bytes() // job.local_size
    slab = Slab(max(rotated, *sizes))
    for dtype in dtypes:
        for nbytes in whole(sizes, dtype, LATENCY_BYTES, 1 << 62):
            case = f"{format_bytes(nbytes)}{_suffix(dtype)}"
            one = [slab.at(dtype, nbytes, 0)]
            if 2 * nbytes > rotated:
                job.progress(f"bandwidth, {case}")
                results += _measure(job, peers, "bandwidth", case, one, rounds)
                continue
            job.progress(f"bandwidth, {case}, warm and cold")
            many = slab.cut(dtype, nbytes)
            results += _measure(job, peers, "bandwidth", f"{case} warm", one, rounds, cold=False)
            results += _measure(job, peers, "bandwidth", f"{case} cold", many, rounds, cold=True)
    return results


def whole(sizes: Sequence[int], dtype: str, above: int, up_to: int) -> list[int]:
    """The sizes in this range, cut to whole elements."""
    item = DTYPES[dtype]
    return sorted({max(size // item, 1) * item for size in sizes if above < size <= up_to})


def _suffix(dtype: str) -> str:
    return "" if dtype == "float32" else f" {dtype}"


def _measure(
    job: Job,
    peers: Sequence[Contender],
    workload: str,
    case: str,
    buffers: Sequence[Buffer],
    rounds: int,
    cold: bool | None = None,
) -> list[Result]:
    dtype, nbytes = buffers[0].dtype, buffers[0].nbytes
    runs = bind(job, peers, f"{workload}, {case}", buffers)
    samples = measure(job, runs, rounds)
    return [Result(workload, case, name, samples[name].wall, nbytes=nbytes, dtype=dtype, cold=cold) for name in runs]


def bind(job: Job, peers: Sequence[Contender], what: str, buffers: Sequence[Buffer]) -> dict[str, Run]:
    """A run of each contender that takes these buffers, which are alike; collective, since it checks their sums."""
    dtype, nbytes = buffers[0].dtype, buffers[0].nbytes
    taking = [peer for peer in peers if peer.takes(dtype, nbytes) and not (peer.one_place and len(buffers) > 1)]
    turns = cycle(range(len(buffers)))  # shared by all contenders, so that each gets what others used long ago
    runs = {}
    for peer in taking:
        runs[peer.name] = _rotate([peer.bind(buffer) for buffer in buffers], turns)
        if peer.sums:
            one = _rotate([peer.bind(buffers[0])], repeat(0))
            check([peer.array(buffers[0])], one, job.rank, job.size, f"{what}, {peer.name}")
    return runs


def _rotate(calls: Sequence[Callable[[], object]], turns: Iterator[int]) -> Run:
    """A run in which each call takes the next buffer."""

    def run(count: int) -> None:
        for turn in islice(turns, count):
            calls[turn]()

    return run
