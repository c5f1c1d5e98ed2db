"""Times and rates on the command line and in tables: 2us, 200Gbit, 40GB."""

from __future__ import annotations

import argparse
import re

__all__ = [
    "format_rate",
    "format_seconds",
    "parse_count",
    "parse_counts",
    "parse_factor",
    "parse_rate",
    "parse_seconds",
]

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def parse_seconds(text: str) -> float:
    """2us, 0.5 ms or 1s, in seconds."""
    match = re.fullmatch(rf"{_NUMBER}\s*(ns|us|ms|s)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 2us or 0.5ms")
    return float(match[1]) * _SECONDS[match[2]]


def parse_rate(text: str) -> float:
    """25Gbit, 100mbit, 200Gbit/s or 12.5 GB/s, in bytes per second.

    Prefixes are powers of 1000, in either case, as tc has them; b, which may mean bits or bytes, is no unit.
    """
    match = re.fullmatch(rf"{_NUMBER}\s*([kKmMgGtT]?)(bit|B)(?:/s)?", text.strip())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate such as 25Gbit, 100mbit or 40GB (per second)")
    return float(match[1]) * _PREFIX[match[2].lower()] / (8 if match[3] == "bit" else 1)


def parse_counts(text: str) -> list[int]:
    """Positive numbers and ranges between commas; a range FIRST:LAST doubles from number to number."""
    counts: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?::(\d+))?", part.strip())
        if match is None or int(match[1]) < 1 or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"{part!r} is neither a positive number nor a range FIRST:LAST")
        count = int(match[1])
        while count <= int(match[2] or match[1]):
            counts.add(count)
            count *= 2
    return sorted(counts)


def parse_count(text: str) -> int:
    """A positive number."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def parse_factor(text: str) -> float:
    """A number that is at least 1."""
    match = re.fullmatch(_NUMBER, text.strip())
    if match is None or float(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a factor of 1 or more")
    return float(match[1])


def format_seconds(seconds: float) -> str:
    """2.00 us, 31.4 ms, 1.50 s."""
    scale, unit = (1e6, "us") if abs(seconds) < 1e-3 else (1e3, "ms") if abs(seconds) < 1 else (1.0, "s")
    value = seconds * scale
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f} {unit}"


def format_rate(rate: float) -> str:
    """Bytes per second as 25 Gbit/s."""
    scale, unit = (1e9, "Gbit/s") if rate >= 1e9 / 8 else (1e6, "Mbit/s")
    return f"{8 * rate / scale:.3g} {unit}"
