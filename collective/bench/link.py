"""The links between nodes: how fast they are, and what has gone through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .job import Job
from .results import Result
from .timing import measure

__all__ = ["GIVEN", "LINK", "Nodes", "given", "measured", "sent_bytes"]

LINK = "wire link"
"""The name of the result: the time in which a node sends `nbytes` to the next one."""

GIVEN = "given"
"""The contender whose rate was not measured."""

_STREAMS = 4  # messages in flight per rank, to as many ranks of the next node
_NODE_BYTES = 32 << 20  # what a node sends at a time, unless its ranks are so many that messages would be short
_SHORTEST = 1 << 20
# Sent in pieces that need no rendezvous. Long messages came to 0.6 of a link of 1 Gbit/s where two ranks of a node sent
# in both directions, and contenders to 1.6 times that "ceiling" (kNetworkSegments in csrc/messages/comm.h tells why).
_PIECE = 60 << 10
_ROUNDS = 10
_SECONDS = 0.1


@dataclass(frozen=True)
class Nodes:
    """Who is where."""

    ranks: list[list[int]]
    """Those of each node, in increasing order; the nodes in the order of their first ranks."""
    own: int
    """The number of this rank's node."""

    @classmethod
    def find(cls, job: Job) -> Nodes:
        """Collective."""
        from mpi4py import MPI

        node = job.comm.Split_type(MPI.COMM_TYPE_SHARED)
        first = node.bcast(job.rank)
        node.Free()
        members: dict[int, list[int]] = {}
        for rank, its_first in enumerate(job.comm.allgather(first)):
            members.setdefault(its_first, []).append(rank)
        return cls(list(members.values()), list(members).index(first))

    @property
    def count(self) -> int:
        return len(self.ranks)

    def least_bytes(self, nbytes: int) -> float:
        """What each of n nodes must send so that all have the sum of arrays of `nbytes`: 2(n-1)/n of it."""
        return 2 * (self.count - 1) / self.count * nbytes


def given(nodes: Nodes, rate: float) -> Result:
    """A rate that the user knows, in bytes per second."""
    return Result(LINK, f"{nodes.count} nodes", GIVEN, [1.0], nbytes=round(rate))


def measured(job: Job, nodes: Nodes) -> Result:
    """MPI messages, from the ranks of every node to those of the next, all at once; collective.

    Bytes are those of the messages, without what the network's protocols add: the rate is what a program can get.
    Where cores are scarce MPI may not fill the links, and contenders come out above the ceiling: then give the rate.
    """
    owners = min(len(ranks) for ranks in nodes.ranks)
    nbytes = max(_SHORTEST, _NODE_BYTES // (owners * _STREAMS))
    run = _exchange(job, nodes, owners, nbytes)
    samples = measure(job, {"mpi": run}, _ROUNDS, _SECONDS, warm_up=False)["mpi"].wall
    return Result(LINK, f"{nodes.count} nodes", "mpi messages", samples, nbytes=owners * _STREAMS * nbytes)


def _exchange(job: Job, nodes: Nodes, owners: int, nbytes: int) -> Callable[[int], None]:
    """The first `owners` ranks of each node send to those of the next one; the others do nothing."""
    from mpi4py import MPI

    mine = nodes.ranks[nodes.own].index(job.rank)
    following = nodes.ranks[(nodes.own + 1) % nodes.count]
    preceding = nodes.ranks[nodes.own - 1]
    streams = range(_STREAMS if mine < owners else 0)
    outgoing = np.zeros(nbytes, np.uint8)
    incoming = [np.zeros(nbytes, np.uint8) for _ in streams]
    pieces = [slice(begin, begin + _PIECE) for begin in range(0, nbytes, _PIECE)]

    def run(count: int) -> None:
        for _ in range(count):
            requests = [
                job.comm.Irecv(incoming[s][piece], preceding[(mine - s) % owners], tag=s)
                for s in streams
                for piece in pieces
            ]
            requests += [
                job.comm.Isend(outgoing[piece], following[(mine + s) % owners], tag=s)
                for piece in pieces
                for s in streams
            ]
            MPI.Request.Waitall(requests)

    return run


def sent_bytes() -> int:
    """What all network interfaces of this node but the loopback have sent since they exist.

    What bypasses the kernel, as InfiniBand's verbs do, is not counted; a bond of two interfaces is counted twice.
    """
    counters = Path("/sys/class/net").glob("*/statistics/tx_bytes")
    return sum(int(path.read_text()) for path in counters if path.parent.parent.name != "lo")
