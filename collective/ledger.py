"""Who holds up the others, in numbers and in words. What the engines find: csrc/engine/ledger.h.

An optimizer's buckets tell where in a step a rank falls behind. If it is late at the first one already, the cause lies
before: in the forward pass, or in what comes before that, such as loading data. If not, it lies in the part of backward
that makes the gradients of the first bucket at which it is late.
"""

from __future__ import annotations

import os
import re
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from . import _core, runtime
from .config import LogLevel
from .handles import Handle

__all__ = ["Straggler", "Stragglers", "Waited", "costs", "local", "stragglers", "tell"]

# What is worth a warning at the end of a job: a rank that has cost the others this much, as a share of the time and in
# seconds, more than the middle rank did, and that was last this often.
_SHARE = 0.05
_SECONDS = 1.0
_TIMES = 10

_PATIENCE_S = 0.3  # with an engine that is inside MPI


@dataclass(frozen=True)
class Straggler:
    """How often a rank came last, and what that cost the others.

    Compared are the steps of one optimizer, or all other operations of a group of ranks. Last is a rank that comes to
    one a millisecond or more after the middle one, when the ranks are sorted by when they come.
    """

    rank: int
    host: str
    what: str  # "steps", "operations"; and of which optimizer, process set or group, where it is not the only one
    count: int  # of these
    seen: int  # how often it was seen to be last; of many operations only some are looked at, see csrc/engine/ledger.h
    share: float  # of these: in how many it was last, from 0 to 1
    lateness_ms: float  # after the middle rank, the mean of those in which it was last
    cost_s: float  # in all, at most elapsed_s
    excess_s: float  # the same, less the cost of the middle rank: what is not mere chance
    elapsed_s: float  # between the first operation and the last
    where: str  # what it was first late at, in words; "" if that is not known

    @property
    def is_notable(self) -> bool:
        """Whether it has cost the others so much that rank 0 says so at shutdown."""
        return self.seen >= _TIMES and self.excess_s >= max(_SECONDS, _SHARE * self.elapsed_s)

    def __str__(self) -> str:
        cost = f"{_text(self.cost_s)} s of {_text(self.elapsed_s)} s ({self.cost_s / self.elapsed_s:.1%})"
        return (
            f"rank {self.rank} ({self.host}) was last in {self.share:.0%} of {self.count} {self.what}, by "
            f"{_text(self.lateness_ms)} ms on average, for which the others waited {cost}"
            + (f"; {self.where}" if self.where else "")
        )


class Stragglers(list[Straggler]):
    """Ranks that were last, those first that cost most; as a text, a line for each that is worth a warning."""

    def __str__(self) -> str:
        return "\n".join(str(entry) for entry in self if entry.is_notable) or "no rank holds up the others"


@dataclass(frozen=True)
class Waited:
    """How often this rank has come to a step's end or another operation of all ranks, and how long it waited for them.

    The wait of a step is that of its last bucket, from its start on this rank to its end. It contains the time that the
    data takes, which all ranks have in common: the rank that waits less than the others is the one they wait for.
    """

    count: int
    seconds: float


def stragglers() -> Stragglers:
    """Who comes late to steps and operations, since init(); not collective: any rank may call it at any time.

    Rank 0's engine tells (in a process set or group of torch.distributed, that of its first rank), whatever its script
    does. It hears from all ranks about once a second, and of the latest operations only after that. Arrays on a device
    count from when the host submits a bucket with them. Steps and operations in which a rank took part that had
    called join() do not count.

    Returns:
        An entry for each rank that was last some time, by cost; its `str()` is what shutdown() would tell.

    Raises:
        CollectiveTimeoutError: that engine did not answer within COLLECTIVE_TIMEOUT.
    """
    engine = runtime.current().engine
    pages = []
    for ticket in engine.ask_ledgers():
        pages.append(Handle(engine, ticket, None, lambda ticket: ticket.ledger).wait())
    return _read(pages)


def local() -> Waited:
    """How long this rank has waited for others, since init(): at once, whatever the others do."""
    return Waited(*runtime.current().engine.waited())


def costs(engine: _core.Engine) -> Mapping[int, float] | None:
    """By rank, for how many seconds the others have waited for it, in the groups that this rank's engine coordinates.

    None where the engine does not answer soon, because it is inside MPI. Ranks that were never late are left out.
    """
    pages = engine.ledgers(_PATIENCE_S)
    if pages is None:
        return None
    sums: dict[int, float] = defaultdict(float)
    for entry in _read(pages):
        sums[entry.rank] += entry.cost_s
    return sums


def tell(engine: _core.Engine) -> None:
    """For shutdown(): warn of ranks that have held up the others, on the rank that knows of them."""
    pages = engine.ledgers(_PATIENCE_S)
    assert pages is not None, "an engine that has shut down answers at once"
    found = _read(pages)
    if any(entry.is_notable for entry in found):
        _core.log(LogLevel.WARNING, f"{found}. (COLLECTIVE_STRAGGLERS=0: not told)")


@dataclass
class _Compared:
    """Steps of one optimizer, or operations: what all ranks have cost."""

    count: float
    seen: dict[int, int]  # by rank
    times: dict[int, float]
    costs: dict[int, float]
    hosts: dict[int, str]
    where: dict[int, str]


def _read(pages: Iterable[_core.LedgerPage]) -> Stragglers:
    found = Stragglers()
    for label, size, elapsed, parts in pages:
        compared = _compared(parts)
        several = sum(what.startswith("steps") for what in compared) > 1
        for what, of in compared.items():
            costs = {rank: min(cost, elapsed) for rank, cost in of.costs.items()}  # some are estimated
            middle = sorted([*costs.values(), *[0.0] * (size - len(costs))])[(size - 1) // 2]
            name = what if several else what.partition(" ")[0]
            name += f" of {label.removesuffix(': ')}" if label else ""
            for rank, cost in costs.items():
                times = of.times[rank]
                found.append(
                    Straggler(
                        rank=rank,
                        host=of.hosts[rank] or socket.gethostname(),
                        what=name,
                        count=round(of.count),
                        seen=of.seen[rank],
                        share=times / of.count,
                        lateness_ms=1e3 * of.costs[rank] / times,
                        cost_s=cost,
                        excess_s=cost - middle,
                        elapsed_s=elapsed,
                        where=of.where[rank],
                    )
                )
    found.sort(key=lambda entry: (-entry.cost_s, entry.rank))
    return found


def _compared(parts: Iterable[_core.LedgerPart]) -> dict[str, _Compared]:
    """By what it is: "operations", or "steps of" an optimizer, of all its plans."""
    compared: dict[str, _Compared] = defaultdict(lambda: _Compared(0, {}, {}, {}, {}, {}))
    plans: dict[int, list[_core.LedgerPart]] = defaultdict(list)  # their buckets in order
    for part in parts:
        series, name, _, _ = part
        plan = plans[series >> 32]
        plan.append(part)
        if series != 0 and series % 2 == 0:
            continue  # not the last bucket
        # "optimizer.0.plan0.1.bucket2 (fc.weight)"
        of = compared[f"steps of {name.partition(' (')[0].rpartition('.plan')[0]}" if series else "operations"]
        _, _, count, entries = part
        of.count += count
        for rank, host, seen, times, cost, longest in entries:
            # Of several plans, the one that has cost most tells.
            if cost > of.costs.get(rank, 0):
                of.where[rank] = _first_late(plan, rank) if series else (f"longest at {longest}" if longest else "")
            of.seen[rank] = of.seen.get(rank, 0) + seen
            of.times[rank] = of.times.get(rank, 0) + times
            of.costs[rank] = of.costs.get(rank, 0) + cost
            of.hosts[rank] = host
    return {what: of for what, of in compared.items() if of.count}


def _first_late(plan: Sequence[_core.LedgerPart], rank: int) -> str:
    """The first bucket of a step at which the rank is late by half as much as at its end, in words."""

    def lateness(part: _core.LedgerPart) -> float:
        return sum(cost for number, _, _, _, cost, _ in part[3] if number == rank) / max(part[2], 1)

    number, (_, name, *_) = next(
        (number, part) for number, part in enumerate(plan) if lateness(part) >= lateness(plan[-1]) / 2
    )
    if len(plan) == 1:
        return ""
    what = _parameters(name)
    if number == 0:
        return f"already at the first bucket ({what}): slow in forward, or before it, as in loading data"
    if number == len(plan) - 1:
        return f"first seen on the last bucket ({what}): slow at the end of backward, or between backward and step()"
    return f"first seen on {what}, bucket {number + 1} of {len(plan)}: slow in that part of backward"


def _text(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _parameters(bucket: str) -> str:
    """What it holds, by its name: "layer3.*" from the first parameter to the last, "first to last" of two modules."""
    contents = bucket.partition(" (")[2].removesuffix(")")
    names = re.split(", | to ", contents)[:2]
    if len(names) == 1:
        return contents or bucket
    common = os.path.commonpath([name.replace(".", "/") for name in names]).replace("/", ".")
    return f"{common}.*" if common else f"{names[0]} to {names[1]}"
