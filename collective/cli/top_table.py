"""The tables of `collective top`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .printable import printable

__all__ = ["screen"]

_WIDTH = 160  # of text that goes to no terminal
Report = Mapping[str, Any]


@contextlib.contextmanager
def screen(live: bool, limit: int) -> Iterator[Callable[[Report, Report | None], None]]:
    """Gives what shows a report and the one before it; live, on a terminal, each in the place of the last."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    if not (live and console.is_terminal):
        yield lambda report, before: console.print(_table(report, before, limit))
        return
    with Live(console=console, screen=True, auto_refresh=False) as display:
        yield lambda report, before: display.update(_table(report, before, limit), refresh=True)


class _Rank:
    """A rank's numbers, from the report before to this one, or since its start."""

    def __init__(self, rank: Report, before: Report | None) -> None:
        self.rank = rank
        self._now = _numbers(rank)
        self._then = None if before is None else _numbers(before)
        if self._now and self._then and self._then["seconds"] >= self._now["seconds"]:
            self._then = None  # it has called init() again

    @property
    def state(self) -> str:
        """What is wrong with it; "" for nothing."""
        if self._now is None:
            return str(self.rank["silence"])
        return "" if self._now["state"] == "running" else str(self._now["state"])

    def rate(self, field: str) -> float:
        """Per second; of a number for each kind, their sum."""
        if self._now is None:
            return 0.0
        done, seconds = _total(self._now[field]), float(self._now["seconds"])
        if self._then is not None:
            done, seconds = done - _total(self._then[field]), seconds - self._then["seconds"]
        return done / seconds

    @property
    def badness(self) -> tuple[bool, bool, float, float]:
        """What puts it before others: silence; a stopped engine; that others wait for it, and it for nobody."""
        return self._now is None, bool(self.state), self.rate("late_seconds"), -self.rate("wait_seconds")

    def cells(self, shows_lateness: bool) -> list[str]:
        """Its row."""
        place = [str(self.rank["rank"]), printable(self.rank["host"]), str(self.rank["pid"] or "-")]
        if self._now is None:
            return [*place, *["-"] * (3 + shows_lateness), self.state]
        return [
            *place,
            f"{self.rate('wait_seconds'):.0%}",
            *([f"{self.rate('late_seconds'):.0%}"] if shows_lateness else []),
            f"{self.rate('bytes') / 1e6:.1f}",
            f"{self.rate('operations'):.1f}",
            printable(self.state or self._in_flight()),
        ]

    def _in_flight(self) -> str:
        assert self._now is not None
        oldest = self._now["oldest"]
        if oldest is None:
            return "-"
        others = self._now["in_flight"] - 1
        more = f", and {others} more" if others > 0 else ""
        return f"{oldest['kind']} {oldest['name']} for {_duration(oldest['seconds'])}{more}"


def _numbers(rank: Report) -> Report | None:
    if rank["statistics"] is None:
        return None
    return {**rank["statistics"], "late_seconds": rank["late_seconds"] or 0.0}


def _total(number: Any) -> float:
    return float(sum(number.values()) if isinstance(number, Mapping) else number)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _table(report: Report, before: Report | None, limit: int) -> Group:
    old = {} if before is None else {rank["rank"]: rank for rank in before["ranks"]}
    ranks = [_Rank(rank, old.get(rank["rank"])) for rank in report["ranks"]]
    shown = sorted(ranks, key=lambda rank: rank.badness, reverse=True)[:limit]
    shows_lateness = any(rank.rank["late_seconds"] is not None for rank in ranks)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rank", "host", "pid", "waits", *(["late"] if shows_lateness else []), "MB/s", "ops/s"):
        table.add_column(name, justify="left" if name == "host" else "right", no_wrap=True)
    table.add_column("in flight", no_wrap=True, overflow="ellipsis")
    for rank in shown:
        table.add_row(*map(Text, rank.cells(shows_lateness)), style="red" if rank.state else "")
    left = len(ranks) - len(shown)
    return Group(Text(_headline(report, ranks)), table, *([Text(f"and {left} more ranks")] if left else []))


def _headline(report: Report, ranks: list[_Rank]) -> str:
    job = report["job"]
    answering = [rank for rank in ranks if rank.rank["statistics"] is not None]
    silent = len(ranks) - len(answering)
    name = f"Slurm job {job['slurm_job']}, {job['pid']}" if job["slurm_job"] else str(job["pid"])
    parts = [
        f"{name} ({printable(job['program'])})",
        f"{job['ranks']} ranks" + (f", {silent} of them silent" if silent else ""),
        f"for {_duration(report['at'] - job['started'])}",
    ]
    if any(rank.rank["statistics"]["steps"] for rank in answering):
        parts.append(f"{min(rank.rate('steps') for rank in answering):.2f} steps/s")
    return "; ".join(parts)
