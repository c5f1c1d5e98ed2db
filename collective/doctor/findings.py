"""What a check says, and the words in which it says it."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .. import _core

__all__ = [
    "Finding",
    "Level",
    "by_value",
    "count_text",
    "fail",
    "ok",
    "ranks_text",
    "rate_text",
    "size_text",
    "time_text",
    "warn",
    "worst",
]


class Level(enum.IntEnum):
    """Of a finding; the worst of all decides about the status."""

    OK = 0
    WARN = 1
    FAIL = 2

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Finding:
    """One line, and the remedy where all is not well."""

    level: Level
    text: str
    remedy: str = ""


def ok(text: str) -> Finding:
    return Finding(Level.OK, text)


def warn(text: str, remedy: str) -> Finding:
    return Finding(Level.WARN, text, remedy)


def fail(text: str, remedy: str) -> Finding:
    return Finding(Level.FAIL, text, remedy)


def worst(findings: Iterable[Finding]) -> Level:
    return max((finding.level for finding in findings), default=Level.OK)


def ranks_text(ranks: Sequence[int]) -> str:
    """rank 3; ranks 0-2, 5"""
    return _core.ranks_text(list(ranks))


def by_value(values: Sequence[object]) -> str:
    """Of one value per rank: "a: ranks 0-2; b: rank 3"."""
    groups: dict[object, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return "; ".join(f"{value}: {ranks_text(ranks)}" for value, ranks in groups.items())


def count_text(count: int, what: str) -> str:
    """1 core, 2 cores"""
    return f"{count} {what}{'' if count == 1 else 's'}"


def rate_text(rate: float) -> str:
    """Of bytes per second: 12 MB/s, 1.2 GB/s"""
    return f"{rate / 1e9:.3g} GB/s" if rate >= 1e9 else f"{rate / 1e6:.3g} MB/s"


def size_text(nbytes: float) -> str:
    """8 B, 4 KiB, 1.5 MiB"""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.3g} {unit}"
    return f"{nbytes:.0f} B"


def time_text(seconds: float) -> str:
    """1.5 us, 20 ms, 3 s"""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
