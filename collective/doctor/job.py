"""What the checks look at: the facts of all ranks, and what was measured between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .facts import Facts

__all__ = ["AllReduce", "Job", "Measured", "Pair"]


@dataclass(frozen=True)
class Pair:
    """Two ranks that have sent each other messages."""

    ranks: tuple[int, int]
    latency: float  # seconds, one way; the best, as what delays some messages may be the hosts' schedulers
    typical: float  # the median
    bandwidth: float  # bytes per second


@dataclass(frozen=True)
class AllReduce:
    """One size; on all ranks together."""

    nbytes: int
    seconds: float  # of the slowest rank; the median
    wrong: list[int]  # ranks with a wrong result


@dataclass
class Measured:
    """What is None was not measured; on rank 0."""

    ways: list[tuple[str, str] | None] | None = None  # by node: the address of rank 0, and the node's interface to it
    node_pairs: list[Pair] | None = None
    node_pairs_left: int = 0  # for which there was no time
    clocks: list[float] | None = None  # by node: seconds ahead of rank 0's
    local_pairs: list[Pair] | None = None
    all_reduces: list[AllReduce] | None = None
    left_out: str = ""  # why no long all-reduce was tried
    cuda_aware: str = ""
    errors: dict[str, str] = field(default_factory=dict)  # by what was to be measured


@dataclass(frozen=True)
class Job:
    ranks: Sequence[Facts]
    error: str = ""  # why the runtime did not start
    measured: Measured = field(default_factory=Measured)

    @cached_property
    def nodes(self) -> dict[int, list[int]]:
        """The ranks of each node, by its first rank."""
        members: dict[int, list[int]] = {}
        for rank, facts in enumerate(self.ranks):
            members.setdefault(facts.get("node", 0), []).append(rank)
        return members

    def name_of(self, rank: int) -> str:
        return f"rank {rank} ({self.ranks[rank]['host']})"
