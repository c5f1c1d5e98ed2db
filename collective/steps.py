"""How many training steps this rank has made."""

from __future__ import annotations

__all__ = ["count", "mark_step"]

_steps = 0


def mark_step() -> None:
    """Count a training step that ends here, for `statistics()` and `collective top`; local to this rank.

    DistributedOptimizer calls it in step(). A script whose gradients are reduced by something else, such as
    DistributedDataParallel, calls it once a step.
    """
    global _steps
    _steps += 1


def count() -> int:
    """The steps so far in this process."""
    return _steps
