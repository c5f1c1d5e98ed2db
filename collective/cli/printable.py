"""Text from elsewhere, for a terminal."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    """Without what a terminal would obey: names in a job may hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
