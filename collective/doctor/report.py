"""Findings as text and as JSON."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .. import version
from .findings import Finding, Level, worst
from .job import Job

__all__ = ["as_json", "as_text"]

_WIDTH = 120
_COLOURS = {Level.OK: "32", Level.WARN: "33", Level.FAIL: "1;31"}


def as_text(found: Sequence[tuple[str, Finding]], coloured: bool) -> str:
    """A line for each, its remedy below it, and a verdict."""
    margin = max(len(name) for name, _ in found) + 8
    lines = []
    previous = ""
    for name, finding in found:
        word = f"{finding.level.word:<4}"
        if coloured:
            word = f"\033[{_COLOURS[finding.level]}m{word}\033[0m"
        shown = "" if name == previous else name
        previous = name
        first, *more = _wrapped(finding.text, margin)
        lines.append(f"{word}  {shown:<{margin - 8}}  {first}")
        lines += [" " * margin + line for line in more]
        lines += [" " * margin + line for line in _wrapped(f"-> {finding.remedy}", margin)] if finding.remedy else []
    counts = {level: sum(finding.level == level for _, finding in found) for level in Level}
    return "\n".join([*lines, f"{counts[Level.FAIL]} fail, {counts[Level.WARN]} warn, {counts[Level.OK]} ok"])


def _wrapped(text: str, margin: int) -> list[str]:
    return textwrap.wrap(text, _WIDTH - margin, break_long_words=False, break_on_hyphens=False) or [""]


def as_json(job: Job, found: Sequence[tuple[str, Finding]]) -> str:
    """All of it: the findings, what was measured, and the facts of each rank."""
    findings = [
        {"check": name, "level": finding.level.word, "text": finding.text, "remedy": finding.remedy}
        for name, finding in found
    ]
    content: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "collective": version.__version__,
        "verdict": worst(finding for _, finding in found).word,
        "findings": findings,
        "measured": asdict(job.measured),
        "ranks": list(job.ranks),
    }
    return json.dumps(content, indent=1)
