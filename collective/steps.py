"""Training steps, as this rank counts them from init() on."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["count", "mark_step", "restart", "when_marked"]

when_marked: list[Callable[[int], None]] = []
"""Called with the number of steps so far, at the end of each."""

_steps = 0


def mark_step() -> None:
    """Say that a training step ends here; local to this rank.

    `statistics()` and `collective top` count steps, and a trace shows them and can be limited to some. A
    DistributedOptimizer marks its own; this is for loops whose gradients are reduced by something else, such as
    DistributedDataParallel. All ranks should mark the same steps.
    """
    global _steps
    _steps += 1
    for tell in when_marked:
        tell(_steps)


def count() -> int:
    """The steps so far."""
    return _steps


def restart() -> None:
    """For init(): count from 0."""
    global _steps
    _steps = 0
