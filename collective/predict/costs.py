"""What the reduction of one bucket costs: the formulas of docs/algorithms.md, and the time that they take on a machine.

A bucket goes through phases, one after the other. A phase has steps that follow each other, each with a latency
(alpha), and bytes that keep the node's link or its memory busy (beta and gamma). Alone on the machine it takes

    steps * latency + bytes / bandwidth

and if buckets overlap, their latencies pass at the same time, while their bytes share the bandwidth; see replay.py.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "SHORT",
    "Machine",
    "Phase",
    "bucket",
    "bucket_in_messages",
    "bucket_on_node",
    "bucket_on_nodes",
    "recursive_doubling",
    "ring",
]

SHORT = 16 << 10
"""Below this many bytes in the wire's type, messages go by recursive doubling: `kRing` of csrc/base/thresholds.h."""


@dataclass(frozen=True)
class Machine:
    """What a node and its link can do.

    Args:
        latency: seconds from one node to another, for a short message, with all that both processors do for it.
        bandwidth: bytes per second of a node's link in each direction, both at once; its ranks share it.
        node_latency: seconds of a synchronisation of the ranks of a node.
        memory_bandwidth: bytes per second that the ranks of a node load and store, all together.
        overhead: seconds that each bucket costs besides, to be started and to be noticed.
    """

    latency: float
    bandwidth: float
    node_latency: float
    memory_bandwidth: float
    overhead: float = 0.0


@dataclass(frozen=True)
class Phase:
    """A part of a bucket's reduction. All counts are per node; as many bytes arrive at a node as leave it."""

    name: str
    starts: int = 0
    """Buckets that are started."""
    messages: int = 0
    """Messages between nodes that follow each other."""
    synchronisations: int = 0
    """Of the ranks of a node."""
    wire: float = 0.0
    """Bytes that leave the node; of nodes that differ, the one that sends most."""
    memory: float = 0.0
    """Bytes that the node's ranks load and store."""

    @property
    def on_link(self) -> bool:
        """Whether it keeps the link busy; else it is the memory."""
        return self.messages > 0

    def latency(self, machine: Machine) -> float:
        """Seconds that pass whatever else is in flight."""
        return (
            self.starts * machine.overhead
            + self.messages * machine.latency
            + self.synchronisations * machine.node_latency
        )

    def busy(self, machine: Machine) -> float:
        """Seconds for which it has its resource to itself, if it never waits.

        Between nodes, segments are reduced while others travel, so the slower of the two counts.
        """
        memory = self.memory / machine.memory_bandwidth
        return max(self.wire / machine.bandwidth, memory) if self.on_link else memory

    def alone(self, machine: Machine) -> float:
        """Seconds if nothing else is in flight."""
        return self.latency(machine) + self.busy(machine)


def ring(p: int, nbytes: float, shares: int = 1) -> Phase:
    """A segmented ring of p nodes, for `nbytes` of each in all; `shares` rings side by side divide them."""
    each = 2 * (p - 1) / p * (nbytes / shares)
    return Phase("ring", messages=2 * (p - 1), wire=shares * each, memory=3 * (p - 1) / p * nbytes)


def recursive_doubling(p: int, nbytes: float) -> Phase:
    """Recursive doubling among p nodes, in place. Counted for the odd rank of a folded pair, if there are any."""
    exchanges = p.bit_length() - 1
    is_folded = p != 1 << exchanges
    return Phase(
        "doubling",
        messages=exchanges + 2 * is_folded,
        wire=nbytes * (exchanges + is_folded),
        memory=3 * nbytes * (exchanges + is_folded),
    )


def _between_nodes(p: int, nbytes: float, owners: int) -> Phase:
    """Between p nodes, on each of which `owners` ranks have a slice of the `nbytes` each."""
    return ring(p, nbytes, owners) if nbytes / owners >= SHORT else recursive_doubling(p, nbytes)


def bucket_on_node(ranks: int, nbytes: float, packed: float) -> tuple[Phase, ...]:
    """All ranks are on one node: "Bucket in shared memory".

    Args:
        ranks: of the node.
        nbytes: of the bucket in the wire's type.
        packed: bytes that each rank loads and stores to pack its gradients; 0 if they lie in the bucket already.
    """
    # The slice that a rank reduces itself need not be packed first.
    memory = ranks * (2 * nbytes + (ranks - 1) / ranks * packed)
    return (Phase("on the node", synchronisations=2, memory=memory),)


def bucket_in_messages(nodes: int, nbytes: float, packed: float) -> tuple[Phase, ...]:
    """One rank on each node: "All-reduce in messages", as one tensor. Arguments as for `bucket_on_node`."""
    return (Phase("pack", memory=packed), _between_nodes(nodes, nbytes, 1))


def bucket_on_nodes(nodes: int, ranks: int, nbytes: float, packed: float) -> tuple[Phase, ...]:
    """Several ranks on each node, each of which owns a slice: "All-reduce on several nodes". Arguments as before.

    The page counts memory traffic from where gradients are packed; here packing is added. Reducing and storing go on
    while segments cross, but the processor that does both serves the network, too: they are counted before and after.
    """
    return (
        Phase("pack and reduce", synchronisations=1, memory=ranks * (packed + nbytes)),
        _between_nodes(nodes, nbytes, ranks),
        Phase("store", synchronisations=1, memory=ranks * nbytes),
    )


def bucket(nodes: int, ranks: int, nbytes: float, packed: float) -> tuple[Phase, ...]:
    """The phases of a bucket's reduction by `ranks` ranks on each of `nodes` nodes; none for a single rank.

    Args:
        nbytes: of the bucket in the wire's type.
        packed: bytes that each rank loads and stores to pack its gradients; 0 if they lie in the bucket already.
    """
    if nodes == 1 and ranks == 1:
        return ()
    if nodes == 1:
        phases = bucket_on_node(ranks, nbytes, packed)
    elif ranks == 1:
        phases = bucket_in_messages(nodes, nbytes, packed)
    else:
        phases = bucket_on_nodes(nodes, ranks, nbytes, packed)
    return (Phase("start", starts=1), *phases)
