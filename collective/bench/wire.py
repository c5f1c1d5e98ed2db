"""The workload `wire`: all-reduces between nodes, beside what the links between them allow.

Whatever the algorithm, n nodes have to send 2(n-1)/n N bytes each, on average, before all have the sum of arrays of N
bytes. The time that this takes at the rate of a node's link is the `ceiling` of the speed of all contenders. With 16
bits on the wire only half of the bytes are sent, and the ceiling is twice as high.

Bytes are counted by the network interfaces themselves, at the largest size: what a contender sends more often than
it must, and what protocols add, shows there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from . import link
from .buffers import Slab
from .flat import Flat
from .job import Job, has_torch
from .link import Nodes
from .peers import OURS, Contender, contenders
from .results import Result
from .sizes import bind, format_bytes, whole
from .timing import Run, measure, rounds_for
from .wire_step import wire_step

__all__ = ["BYTES", "CEILING", "FP16", "WIRE", "wire"]

WIRE = "wire"
BYTES = "wire bytes"
"""The names of the results: times of all-reduces; bytes sent by each node, as multiples of what it must send."""

CEILING = "ceiling"
"""The contender that is as fast as the links."""

FP16 = f"{OURS} fp16"

_PEERS = ("views", "c10d", "fp16", "mpi", "mpi-pieces", "gloo")

_LONG = 0.1  # seconds of a call

# Bytes are counted over so much data, or so many calls, that what else goes over the network hardly shows.
_COUNTED_BYTES = 32 << 20
_MOST_COUNTED = 64


def wire(job: Job, sizes: Sequence[int], rounds: int | None, chosen: Sequence[str], rate: float | None) -> list[Result]:
    """Measure all-reduces and a training step; collective. On a single node, only leave a note.

    Args:
        sizes: bytes of the arrays, which are float32.
        rounds: samples of each figure; None: 3 to 15, so that slow links do not take all day.
        chosen: of PEERS; some have no meaning here.
        rate: of a node's link, in bytes per second; None: measure it.
    """
    nodes = Nodes.find(job)
    if nodes.count == 1:
        job.note("wire is left out: all ranks are on one node, so there is no wire between them")
        return []
    job.progress("wire, the links")
    found = link.given(nodes, rate) if rate else link.measured(job, nodes)
    peers = contenders(job, [peer for peer in _PEERS if peer in chosen])
    flat = _flat(job, nodes) if "views" in chosen and has_torch() else None
    if flat is not None:
        peers.insert(2, flat)  # after the bucket that it is to be compared with
    results = [found, *_allreduces(job, nodes, peers, sizes, rounds, found.nbytes / found.best)]
    if flat is not None:
        flat.close()
    return results + wire_step(job, rounds, chosen)


def _flat(job: Job, nodes: Nodes) -> Flat | None:
    if max(len(ranks) for ranks in nodes.ranks) == 1:
        job.note("ours flat is left out: with one rank on each node it is the same as ours views")
        return None
    return Flat(f"{OURS} flat", job)


def _allreduces(
    job: Job, nodes: Nodes, peers: Sequence[Contender], sizes: Sequence[int], rounds: int | None, rate: float
) -> list[Result]:
    """Blocking calls at each size, and the bytes that they send at the largest."""
    results = []
    sizes = whole(sizes, "float32", 0, max(sizes))
    slab = Slab(sizes[-1])
    for nbytes in sizes:
        case = format_bytes(nbytes)
        job.progress(f"wire, {case}")
        runs = bind(job, peers, f"wire, {case}", [slab.at("float32", nbytes, 0)])
        ceiling = nodes.least_bytes(nbytes) / rate
        samples = measure(job, runs, rounds or rounds_for(ceiling), warm_up=ceiling < _LONG)
        results.append(Result(WIRE, case, CEILING, [ceiling], nbytes=nbytes))
        results += [Result(WIRE, case, name, samples[name].wall, nbytes=nbytes) for name in runs]
    job.progress(f"wire, bytes of {case}")
    return results + _bytes(job, nodes, runs, nbytes)


def _bytes(job: Job, nodes: Nodes, runs: Mapping[str, Run], nbytes: int) -> list[Result]:
    """One sample per node."""
    calls = min(_MOST_COUNTED, math.ceil(_COUNTED_BYTES / nbytes))
    results = []
    for name, run in runs.items():
        before = _counters(job, nodes)
        run(calls)
        after = _counters(job, nodes)
        least = calls * nodes.least_bytes(nbytes)
        multiples = [(b - a) / least for a, b in zip(before, after, strict=True)]
        results.append(Result(BYTES, format_bytes(nbytes), name, multiples, unit="x", nbytes=nbytes))
    return results


def _counters(job: Job, nodes: Nodes) -> list[int]:
    """Of every node, while nothing is under way."""
    job.comm.Barrier()
    reads = job.rank == nodes.ranks[nodes.own][0]
    everyone = job.comm.allgather(link.sent_bytes() if reads else 0)
    return [everyone[ranks[0]] for ranks in nodes.ranks]
