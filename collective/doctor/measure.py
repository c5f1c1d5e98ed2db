"""Messages between the ranks of a job: latency, bandwidth, clocks, and the results of all-reduces. All collective.

Ranks that take no part in a measurement wait asleep: on a machine with fewer cores than ranks they would slow it down.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .. import addresses, ops
from ..clocks import compare
from .facts import Facts
from .findings import time_text
from .job import AllReduce, Pair

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["all_reduces", "between_nodes", "clocks", "rounds", "ways", "within_nodes"]

SMALL, LARGE = 4 << 10, 64 << 20
_PINGS = 50
_SHORT, _LONG = 1 << 20, 8 << 20  # bytes: long messages where a short one takes less than this
_LONG_BELOW_S = 0.005
_BUDGET_S = 8.0  # for all pairs of nodes
_TOO_LONG_S = 8.0
_LONG_ENOUGH_S = 1.0  # for one size of all-reduces
_ROOM = 8  # times LARGE: what a rank must have free for an all-reduce of it


def ways(comm: MPI.Intracomm, nodes: Sequence[list[int]]) -> list[tuple[str, str] | None]:
    """By node: the address of rank 0, and the interface by which this node gets there; None: not all get there."""
    local = next(len(members) for members in nodes if comm.Get_rank() in members)
    found = addresses.find(comm, local)
    everyone = comm.allgather(None if found is None else (found.address, found.interface))
    return [everyone[members[0]] for members in nodes]


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """All pairs of 0 .. count - 1, in rounds of pairs that have nobody in common.

    As in a tournament: one stays seated, the others move up by a place, and who faces each other meets.
    """
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def between_nodes(comm: MPI.Intracomm, nodes: Sequence[list[int]]) -> tuple[list[Pair], int]:
    """The pairs of the nodes' first ranks, and how many of them there was no time for."""
    from mpi4py import MPI

    firsts = [members[0] for members in nodes]
    me = comm.Get_rank()
    taking_part = comm.Split(0 if me in firsts else MPI.UNDEFINED, me)
    own: list[Pair] = []
    met = 0
    if me in firsts:
        end = time.monotonic() + _BUDGET_S
        for pairs in rounds(len(firsts)):
            for a, b in pairs:
                own += _ping_pong(comm, firsts[a], firsts[b])
            met += len(pairs)
            if taking_part.bcast(time.monotonic() > end):
                break
        taking_part.Free()
    found = _quietly(comm, own)
    return found, len(firsts) * (len(firsts) - 1) // 2 - comm.bcast(met)


def within_nodes(comm: MPI.Intracomm, nodes: Sequence[list[int]]) -> list[Pair]:
    """The first two ranks of each node that has two, on all nodes at once."""
    own = [pair for members in nodes if len(members) > 1 for pair in _ping_pong(comm, members[0], members[1])]
    return _quietly(comm, own)


def _quietly(comm: MPI.Intracomm, own: list[Pair]) -> list[Pair]:
    """Those of all ranks."""
    arrived = comm.Ibarrier()
    while not arrived.Test():
        time.sleep(1e-3)
    return [pair for pairs in comm.allgather(own) for pair in pairs]


def _ping_pong(comm: MPI.Intracomm, first: int, second: int) -> list[Pair]:
    """The pair, on its first rank; nothing on others, who are not concerned."""
    me = comm.Get_rank()
    if me not in (first, second):
        return []
    peer = second if me == first else first
    delays = [_round_trip(comm, peer, me == first, 8) / 2 for _ in range(_PINGS)]
    _round_trip(comm, peer, me == first, _SHORT)  # buffers and connections
    once = _round_trip(comm, peer, me == first, _SHORT)
    nbytes = _LONG if once < _LONG_BELOW_S else _SHORT
    if me == first:
        comm.send(nbytes, peer)
    else:
        nbytes = comm.recv(source=first)
    best = min(_round_trip(comm, peer, me == first, nbytes) for _ in range(2))
    return [Pair((first, second), min(delays), statistics.median(delays), 2 * nbytes / best)] if me == first else []


def _round_trip(comm: MPI.Intracomm, peer: int, is_first: bool, nbytes: int) -> float:
    data = np.zeros(nbytes, np.uint8)
    begin = time.perf_counter()
    for sends in (is_first, not is_first):
        if sends:
            comm.Send(data, peer)
        else:
            comm.Recv(data, peer)
    return time.perf_counter() - begin


def clocks(comm: MPI.Intracomm, nodes: Sequence[list[int]]) -> list[float]:
    """By node: by how much its clock is ahead of rank 0's, known to half the time of a message there and back."""
    return [reading.ahead for reading in compare(comm, [members[0] for members in nodes], time.time)]


def all_reduces(
    comm: MPI.Intracomm, facts: Facts, local_size: int, links: Sequence[Pair]
) -> tuple[list[AllReduce], str]:
    """A short one and, where there is memory and time for it, a long one, of data that differ by rank and element.

    Also returns why there was no long one. `links` are those between nodes that have been measured.
    """
    from mpi4py import MPI

    memory = facts["memory"]
    free = min(memory["available"], memory["limit"] - memory["used"] if memory["limit"] else memory["available"])
    room = comm.allreduce(free // local_size, MPI.MIN)
    # A ring sends nearly all of it twice through each link.
    seconds = 2 * LARGE / min(pair.bandwidth for pair in links) if links else 0.0
    why_not = ""
    if room < _ROOM * LARGE:
        why_not = "there is too little memory"
    elif seconds > _TOO_LONG_S:
        why_not = f"the slowest link would take {time_text(seconds)}"
    return [_all_reduce(comm, nbytes) for nbytes in ([SMALL] if why_not else [SMALL, LARGE])], why_not


def _all_reduce(comm: MPI.Intracomm, nbytes: int) -> AllReduce:
    size = comm.Get_size()
    index = np.arange(nbytes // 4, dtype=np.float32) % 1000
    own = index + comm.Get_rank() % 100
    # Whole numbers below 2^24, up to some 15,000 ranks: exact in whatever order they are added.
    expected = size * index + sum(rank % 100 for rank in range(size))
    wrong = False
    times: list[float] = []
    for _ in range(20 if nbytes <= SMALL else 4):
        comm.Barrier()
        begin = time.perf_counter()
        result = ops.allreduce(own, ops.Sum, name=f"collective.doctor.{nbytes}")
        times.append(time.perf_counter() - begin)
        wrong |= not np.array_equal(result, expected)
        if comm.bcast(sum(times) > _LONG_ENOUGH_S):
            break
    steady = times[1:] or times  # the first one also agrees on the name
    everyone = comm.allgather((wrong, statistics.median(steady)))
    return AllReduce(nbytes, max(taken for _, taken in everyone), [r for r, (bad, _) in enumerate(everyone) if bad])
