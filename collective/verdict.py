"""Why a job does not go on, in words: put together from what each rank tells about itself.

Nothing here asks anybody; `stalls.py` does. A rank that waits is no culprit, whatever others wait for from it: the
verdict is about those that do not answer, that have ended, or whose scripts are elsewhere. If there are none, the ranks
wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import _core
from .outofband import Process, Silence

__all__ = ["Rank", "Verdict", "judge"]

_MOST_LINES = 6
_MOST_HOSTS = 4

_Group = tuple[str, str, tuple[int, ...]]  # its label, its identity and its ranks
_Key = tuple[_Group, str]  # of something in flight


@dataclass(frozen=True)
class Rank:
    """What is known of a rank."""

    silence: Silence | None = None
    """Why it did not answer; None: it did, and what follows is its answer."""
    process: str | None = None
    """The state of a process that did not answer, as /proc has it; "" where it is gone; None: not known."""
    waits: Mapping[str, Any] | None = None
    """Engine.waits(); None if the engine does not make way."""
    at: str = ""
    """Where its script is; see whereabouts.py."""
    is_in_package: bool = False
    """Whether its script is in a function of this package."""

    @property
    def held_up(self) -> Mapping[str, Any] | None:
        """What it has submitted, but its device has not come to; None for nothing."""
        return next((one for _, _, one in self.in_flight() if one["phase"] == "not ready"), None)

    @property
    def is_waiting(self) -> bool:
        """Whether its script waits for other ranks, rather than they for it."""
        if self.waits is None or self.held_up is not None or not any(True for _ in self.in_flight()):
            return False
        return bool(self.waits["waited_for"] or self.is_in_package)

    @property
    def has_left(self) -> bool:
        """Whether it has called shutdown(), or its script has ended."""
        return self.waits is not None and bool(self.waits["shut_down"])

    def in_flight(self) -> Iterator[tuple[_Key, Mapping[str, Any], Mapping[str, Any]]]:
        """What is in flight there: its key, its group, and itself."""
        for group in self.waits["groups"] if self.waits is not None else ():
            identity = _identity(group)
            for one in group["in_flight"]:
                own = f"not ready: {one['what']}" if one["phase"] == "not ready" else one["key"] or one["what"]
                yield (identity, own), group, one


@dataclass(frozen=True)
class Verdict:
    """What to tell."""

    text: str
    cause: frozenset[object]
    """Equal for verdicts that blame the same: culprits and what is wrong with them, or the waits of a circle."""
    stalled: frozenset[_Key]


@dataclass
class _Wait:
    """Something that ranks wait for."""

    what: str
    bucket: int | None
    run: int
    peer: int | None
    seconds: float
    state: str = ""
    waiting: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    undone: str = ""  # what the missing have not done
    silent: list[int] = field(default_factory=list)


def judge(ranks: Mapping[int, Rank], processes: Sequence[Process], patience: float) -> Verdict | None:
    """Put together what ranks tell.

    Args:
        ranks: those that were asked, by number.
        processes: of all ranks of the job.
        patience: seconds; what has been in flight for less is no reason to tell anything, but it is told from half of
            that on, if there is one.

    Returns:
        None if nobody waits that long.
    """
    waits = _stalled(ranks, patience)
    if not waits:
        return None
    missing = {rank for wait in waits.values() for rank in wait.missing}
    silent = {rank for wait in waits.values() for rank in wait.silent}
    culprits = sorted(silent | {rank for rank in missing if not ranks[rank].is_waiting})
    waiting = sorted({rank for wait in waits.values() for rank in wait.waiting}.difference(culprits))
    seconds = max(wait.seconds for wait in waits.values())
    place = _Place(processes)
    waits_or_wait = "waits" if len(waiting) == 1 else "wait"
    cause: Iterable[object] = waits
    if culprits:
        late = place.located(culprits)
        who = f"{_core.ranks_text(waiting)} {waits_or_wait} for {late}" if waiting else f"{late} cannot go on"
        told = _grouped(culprits, lambda rank: _doing(ranks[rank], processes[rank]))
        cause = [(rank, ranks[rank].silence) for rank in culprits]
    else:
        who = (
            "ranks wait for each other"
            if missing
            else f"{_core.ranks_text(waiting)} {waits_or_wait}, and no rank is late"
        )
        told = _grouped(sorted(missing.union(waiting)), lambda rank: _waiting_for(ranks[rank]))
    lines = [f"stalled for {seconds:.{0 if seconds >= 10 else 1}f} s: {who}"]
    lines += [f"  {line}" for line in _lines(waits)]
    lines += [f"  {place.located(some, with_process=True)}: {what}" for what, some in told]
    return Verdict("\n".join(lines), frozenset(cause), frozenset(waits))


def _identity(group: Mapping[str, Any]) -> _Group:
    return group["label"], group["identity"], tuple(group["ranks"])


def _is_silent(known: Rank) -> bool:
    return known.silence is not None or known.waits is None


def _stalled(ranks: Mapping[int, Rank], patience: float) -> dict[_Key, _Wait]:
    """What has been in flight for so long on any rank; the oldest first."""
    everywhere = [
        (rank, *found)
        for rank, known in ranks.items()
        for found in known.in_flight()
        # A rank that has joined waits for as long as it takes.
        if found[2]["key"] != "join" or found[2]["phase"] == "not ready"
    ]
    if all(one["seconds"] < patience for _, _, _, one in everywhere):
        return {}
    late = {key for _, key, _, one in everywhere if one["seconds"] >= patience / 2}  # so that one verdict is complete
    waits: dict[_Key, _Wait] = {}
    begun = set()  # for which no other rank is missing
    for rank, key, _, one in sorted(everywhere, key=lambda found: -found[3]["seconds"]):
        if key not in late:
            continue
        wait = waits.setdefault(key, _Wait(one["what"], one["bucket"], one["run"], one["peer"], one["seconds"]))
        wait.state = wait.state or one["state"]
        wait.undone = _undone(one)
        if one["phase"] == "not ready":
            wait.missing.append(rank)
        else:
            wait.waiting.append(rank)
        if one["peer"] is None and (one["phase"] == "not ready" or _is_agreed(one)):
            begun.add(key)
    for key, wait in waits.items():
        wait.waiting.sort()
        needed = [rank for rank in (key[0][2] if wait.peer is None else [wait.peer]) if rank in ranks]
        wait.silent = [rank for rank in needed if _is_silent(ranks[rank])]
        if key in begun:
            continue
        here = {*wait.waiting, *wait.silent}
        wait.missing = [rank for rank in needed if rank not in here and _is_missing(ranks[rank], key[0], wait)]
    return waits


def _is_agreed(one: Mapping[str, Any]) -> bool:
    """Whether all ranks have submitted it; of buckets, and of what has turns, none knows that of the others."""
    return one["phase"] in ("agreed", "runs") and one["bucket"] is None and not one["run"]


def _is_missing(known: Rank, group_of_wait: _Group, wait: _Wait) -> bool:
    """Whether a rank that does not wait for this is why others do."""
    if wait.peer is not None:
        return True
    assert known.waits is not None
    for group in known.waits["groups"]:
        if _identity(group) != group_of_wait:
            continue
        if group["joined"]:
            return False
        if wait.bucket is not None:
            started: list[int] = group["started"]
            return wait.bucket >= len(started) or started[wait.bucket] < wait.run
        return not wait.run or bool(group["turns"] < wait.run)
    return True  # it has no such group any more


def _undone(one: Mapping[str, Any]) -> str:
    if one["phase"] == "not ready":
        return "come to it on the device"
    if one["bucket"] is not None:
        return f"started run {one['run']}"
    if one["peer"] is not None:
        return ""
    return "reached it" if one["run"] else "submitted it"


def _lines(waits: Mapping[_Key, _Wait]) -> list[str]:
    lines = []
    for ((label, *_), _), wait in waits.items():
        parts = []
        if wait.waiting:
            parts.append(f"{_core.ranks_text(wait.waiting)} {'waits' if len(wait.waiting) == 1 else 'wait'}")
        if wait.missing and wait.undone:
            have = "has" if len(wait.missing) == 1 else "have"
            parts.append(f"{_core.ranks_text(wait.missing)} {have} not {wait.undone}")
        if wait.silent:
            parts.append(f"{_core.ranks_text(wait.silent)} {'does' if len(wait.silent) == 1 else 'do'} not answer")
        if not wait.missing and not wait.silent and wait.state:
            parts.append(wait.state)
        lines.append(f"{label}{wait.what}: {'; '.join(parts)}")
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"and {len(lines) - _MOST_LINES} more"]
    return lines


def _grouped(ranks: Iterable[int], text: Callable[[int], str]) -> list[tuple[str, list[int]]]:
    """Ranks of which the same is to be told, together."""
    told: dict[str, list[int]] = {}
    for rank in ranks:
        told.setdefault(text(rank), []).append(rank)
    return list(told.items())


def _waiting_for(known: Rank) -> str:
    key, _, oldest = max(known.in_flight(), key=lambda found: found[2]["seconds"])
    return f"waiting for {key[0][0]}{oldest['what']}" + (f", at {known.at}" if known.at else "")


def _doing(known: Rank, process: Process) -> str:
    """What a rank does that others wait for."""
    if known.silence is not None:
        return _silent(known.silence, known.process, process)
    if known.has_left:
        return "shut down: its script ended, or it called shutdown()"
    at = f"script at {known.at}" if known.at else "nothing is known about the script"
    if known.held_up is not None:
        return f"{known.held_up['what']} {known.held_up['state']}; {at}"
    return at if known.waits is not None else f"engine inside MPI, from where it does not come back; {at}"


def _silent(silence: Silence, state: str | None, process: Process) -> str:
    """state: of the process, as Rank has it."""
    if state in ("", "Z"):
        return "process gone: it was killed, or it crashed"
    if silence is Silence.NO_PROCESS:
        return "process gone, or it has shut down" if state is None else "shut down, but its process is still there"
    if silence is Silence.NO_HOST:
        return f"host does not answer: no connection to {process.address}"
    if state is None:
        return "process does not answer: it is stopped, or a function in C keeps the interpreter's lock"
    if state in "Tt":
        return f"stopped by a signal or a debugger; kill -CONT {process.pid} on its host lets it go on"
    return (
        "alive, but Python's threads do not run: a function in C keeps the interpreter's lock; "
        f"py-spy dump --native --pid {process.pid} on its host shows which"
    )


class _Place:
    """Ranks in words, with where they are."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self._processes = processes
        self._one_host = len({process.host for process in processes}) == 1

    def located(self, ranks: Sequence[int], with_process: bool = False) -> str:
        """ "rank 3 (node1, process 4242)"; the process only where it is one; hosts only where the job has several."""
        where: list[str] = []
        if not self._one_host:
            hosts = list(dict.fromkeys(self._processes[rank].host for rank in ranks))
            more = f"{len(hosts) - _MOST_HOSTS} more hosts"
            where = hosts if len(hosts) <= _MOST_HOSTS else [*hosts[:_MOST_HOSTS], more]
        if with_process and len(ranks) == 1:
            where.append(f"process {self._processes[ranks[0]].pid}")
        return _core.ranks_text(list(ranks)) + (f" ({', '.join(where)})" if where else "")
