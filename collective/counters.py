"""What this rank has done since init(), counted by the engine all the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import _core, runtime, steps

__all__ = ["InFlight", "Statistics", "of_engine", "statistics"]


@dataclass(frozen=True)
class InFlight:
    """An operation that is not finished."""

    name: str
    """Under which the ranks agree on it."""
    kind: str
    seconds: float
    """Since it was submitted on this rank."""


@dataclass(frozen=True)
class Statistics:
    """Of one rank, at one moment. Kinds are "allreduce", "broadcast", ...; "bucket" is one all-reduce of gradients that
    travel together, "buckets" the agreement on all of them before the first."""

    seconds: float
    """Since init()."""
    operations: Mapping[str, int]
    """Finished without error, by kind. Each tensor of a grouped or fused operation counts."""
    bytes: Mapping[str, int]
    """Of the arrays that this rank has handed to these operations, or received (broadcast, recv), by kind; as its
    script has them, whatever compression and algorithms make of them on the way."""
    failed: int
    """Operations that ended in an error."""
    in_flight: int
    """Operations in flight now."""
    in_flight_seconds: float
    """Time in which at least one operation was in flight."""
    wait_seconds: float
    """Time in which at least one thread has waited for an operation: communication that computation did not hide."""
    steps: int
    """Calls of DistributedOptimizer's step() and of `mark_step()`, in this process."""
    oldest: InFlight | None
    """What has been in flight for the longest time."""
    state: str
    """"running", or why the engine has stopped."""


def statistics() -> Statistics:
    """What this rank has done since init(); local, and may be called at any time from any thread."""
    return of_engine(runtime.current().engine)


def of_engine(engine: _core.Engine) -> Statistics:
    """The same of this engine, also while and after it shuts down. For this package's modules."""
    found = engine.statistics()
    oldest = found.oldest
    return Statistics(
        seconds=found.seconds,
        operations={kind: operations for kind, (operations, _) in found.finished.items()},
        bytes={kind: nbytes for kind, (_, nbytes) in found.finished.items()},
        failed=found.failed,
        in_flight=found.in_flight,
        in_flight_seconds=found.in_flight_seconds,
        wait_seconds=found.waited_seconds,
        steps=steps.count(),
        oldest=None if oldest is None else InFlight(oldest.name, oldest.kind, oldest.seconds),
        state=found.state,
    )
