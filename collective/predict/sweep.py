"""Measures what a Machine is made of: buckets reduced by themselves on the ranks of this job.

On one node, the time of a bucket is fitted by

    2 synchronisations + bytes through memory / memory bandwidth

Between nodes, short buckets are fitted, after what happens on the nodes has been taken off, by

    overhead + messages * latency + bytes on the wire * time per byte

with sizes on both sides of the 16 KiB that part recursive doubling from the ring, since these differ in how many
messages follow each other. The bandwidth is not that of short buckets, but what several large ones in flight reach
together: a single one leaves gaps, which the others fill.

Of several samples the shortest counts: whatever disturbs a sample makes it longer. In a fit all sizes count alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import lifecycle, runtime
from ..bench.job import Job
from ..bench.reduction import Reduction
from ..bench.timing import Run, measure
from ..process_sets import ProcessSet
from .costs import Machine, Phase, bucket, bucket_on_node

__all__ = ["ASSUMED", "Measured", "Times", "copy_bandwidth", "fit", "merge", "sweep"]

ASSUMED = Machine(latency=10e-6, bandwidth=25e9 / 8, node_latency=2e-6, memory_bandwidth=40e9)
"""What counts where something is neither given nor measured; latency and bandwidth always are one of the two."""

_ON_NODE = [1 << shift for shift in (12, 14, 22, 23, 24)]  # between them, too much depends on the cache
_BETWEEN_NODES = [1 << shift for shift in (10, 11, 12, 13, 14, 15, 16)]  # of each slice
# How many in flight, and bytes of each. On 2 virtual nodes with links of 119 MB/s: 1 reached 67 to 83 MB/s each way, 2
# as many, 4 up to 96, 12 up to 111, as gradients do in a step.
_LARGE = (12, 8 << 20)
_ROUNDS = 7
_LARGE_ROUNDS = 3
_COPIED = 16 << 20  # bytes

Times = dict[tuple[int, int], float]
"""Seconds by how many buckets are reduced at once and the bytes of each: the slowest rank's, the best of several."""


@dataclass
class Measured:
    """What a sweep has found."""

    fields: dict[str, float] = field(default_factory=dict)
    """Some of a Machine's."""
    times: dict[str, Times] = field(default_factory=dict)
    """What they were fitted to, "on a node" and "between nodes"."""


def sweep(job: Job) -> Measured:
    """What this job can tell of a Machine; collective. A job on one node does not tell latency and bandwidth."""
    ranks = runtime.local_size()
    nodes = job.size // ranks
    found = Measured({"memory_bandwidth": copy_bandwidth(job)})
    if ranks > 1:
        _on_node(job, ranks, found)
    if nodes > 1:
        _between_nodes(job, nodes, ranks, found)
    return found


def copy_bandwidth(job: Job) -> float:
    """Bytes per second that the ranks of a node load and store when all of them copy; collective."""
    source, target = np.ones(_COPIED, np.uint8), np.empty(_COPIED, np.uint8)

    def copy(count: int) -> None:
        for _ in range(count):
            np.copyto(target, source)

    seconds = min(measure(job, {"copy": copy}, _ROUNDS)["copy"].wall)
    return runtime.local_size() * 2 * _COPIED / seconds


def _on_node(job: Job, ranks: int, found: Measured) -> None:
    """All nodes at the same time, each by itself."""
    nodes = sorted(set(job.comm.allgather(_ranks_of_node(job))))
    sets = [lifecycle.add_process_set(list(members)) for members in nodes]
    mine = next(process_set for process_set in sets if process_set.included())
    times = _times(job, [(1, nbytes) for nbytes in _ON_NODE], mine)
    for process_set in sets:
        lifecycle.remove_process_set(process_set)
    phases = [bucket_on_node(ranks, nbytes, packed=0)[0] for _, nbytes in times]  # in their buckets already
    rows = [[float(phase.synchronisations), phase.memory] for phase in phases]
    latency, per_byte = fit(rows, list(times.values()))
    found.times["on a node"] = times
    found.fields["node_latency"] = latency
    if per_byte > 0:  # else the copies tell it
        found.fields["memory_bandwidth"] = 1 / per_byte


def _ranks_of_node(job: Job) -> tuple[int, ...]:
    from mpi4py import MPI

    node = job.comm.Split_type(MPI.COMM_TYPE_SHARED)
    members = tuple(node.allgather(job.rank))
    node.Free()
    return members


def _between_nodes(job: Job, nodes: int, ranks: int, found: Measured) -> None:
    times = _times(job, [(1, ranks * nbytes) for nbytes in _BETWEEN_NODES], None)
    times |= _times(job, [_LARGE], None, _LARGE_ROUNDS)
    known, _ = merge({"latency": 0.0, "overhead": 0.0}, found.fields)
    found.times["between nodes"] = times

    def split(nbytes: int) -> tuple[Phase, float]:
        """What crosses, and the seconds of the rest; the sweep's gradients lie in their buckets already."""
        phases = bucket(nodes, ranks, nbytes, packed=0)
        (crossing,) = [phase for phase in phases if phase.on_link]
        return crossing, sum(phase.alone(known) for phase in phases if not phase.on_link)

    rows, seconds = [], []
    for (_, nbytes), time in times.items():
        if nbytes < _LARGE[1]:
            crossing, rest = split(nbytes)
            rows.append([1.0, float(crossing.messages), crossing.wire])
            seconds.append(max(time - rest, 0.1 * time))  # noise might make it negative
    overhead, latency, _ = fit(rows, seconds)
    count, nbytes = _LARGE
    crossing, rest = split(nbytes)  # of one bucket only: the others' is done while something crosses
    rest += overhead + crossing.messages * latency
    bandwidth = count * crossing.wire / max(times[_LARGE] - rest, 0.1 * times[_LARGE])
    found.fields |= {"overhead": overhead, "latency": latency, "bandwidth": bandwidth}


def _times(job: Job, cases: Sequence[tuple[int, int]], process_set: ProcessSet | None, rounds: int = _ROUNDS) -> Times:
    """Reduce buckets in each of these ways, by turns; collective."""
    chosen: dict[str, Any] = {} if process_set is None else {"process_set": process_set}
    runs: dict[str, Run] = {}
    for count, nbytes in cases:
        shapes = [(f"bucket.{number}", (nbytes // 4,)) for number in range(count)]
        runs[f"{count} of {nbytes}"] = Reduction(shapes, as_view=True, **chosen).run
    samples = measure(job, runs, rounds)
    shortest = [min(sample.wall) for sample in samples.values()]
    return dict(zip(cases, shortest, strict=True))


def fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """The factors, none of them negative, with which the rows come nearest to the times.

    Distances count relative to the times. Of all choices of factors that are 0, the best one whose others come out
    positive: there are few.
    """
    weights = 1 / np.asarray(seconds, float)
    matrix = np.asarray(rows, float) * weights[:, None]
    count = matrix.shape[1]
    answers: list[tuple[float, list[float]]] = []
    for free in itertools.product([False, True], repeat=count):
        columns = np.flatnonzero(free)
        factors = np.zeros(count)
        if len(columns):
            scale = np.abs(matrix[:, columns]).max(axis=0)
            factors[columns] = np.linalg.lstsq(matrix[:, columns] / scale, np.ones(len(seconds)), rcond=None)[0] / scale
        if (factors >= 0).all():
            answers.append((float(np.square(matrix @ factors - 1).sum()), factors.tolist()))
    return min(answers)[1]


def merge(given: Mapping[str, float], measured: Mapping[str, float]) -> tuple[Machine, dict[str, str]]:
    """A Machine of what is given, else measured, else assumed; and which of the three each field is."""
    fields = ("latency", "bandwidth", "node_latency", "memory_bandwidth", "overhead")
    origin = {name: "given" if name in given else "measured" if name in measured else "assumed" for name in fields}
    values = {name: given.get(name, measured.get(name, getattr(ASSUMED, name))) for name in fields}
    return Machine(**values), origin
