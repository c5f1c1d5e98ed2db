"""Which process this is: one that may be a rank, or a child of one, where MPI must not be called."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

from .config import mark_rank, marked_rank
from .errors import ForkError

__all__ = ["after_fork", "is_forked", "mark", "refuse_child", "refuse_heir"]

_forked_from: int | None = None  # the rank, in a child that was forked after init()


def after_fork(rank: int) -> None:
    """Called in a child that was forked from this rank."""
    global _forked_from
    _forked_from = rank


def is_forked() -> bool:
    """Whether this process was forked from a rank after its init()."""
    return _forked_from is not None


def mark(rank: int) -> None:
    """Let the processes that this one starts know whose children they are."""
    mark_rank(os.getpid(), rank)


def refuse_child() -> None:
    """Raise ForkError in a forked child and in a multiprocessing worker."""
    if _forked_from is not None:
        raise ForkError(
            f"this process was forked from rank {_forked_from} after init(): MPI cannot be used in it. Do the "
            f"collective operations in the parent, or start workers with the 'spawn' or 'forkserver' method."
        )
    if multiprocessing.parent_process() is not None:
        parent = marked_rank()
        whose = "" if parent is None else f" of rank {parent[1]}"
        raise ForkError(
            f"the runtime is not initialised here: this process is a multiprocessing worker{whose} (such as a "
            f"DataLoader's), not a rank. Hand it rank() and size() as arguments, do the collective operations in its "
            f'parent, and put what calls init() under `if __name__ == "__main__":`.'
        )


def refuse_heir() -> None:
    """Raise ForkError in a child that a rank has started with its own environment.

    The launcher's variables would make it take its parent's place: all ranks' children would form a second job, and
    one alone would wait for the others forever.
    """
    parent = marked_rank()
    if parent is None or parent[0] == os.getpid() or parent[0] not in _ancestors():
        return  # not a child; or the rank itself, after os.exec*(); or the parent has ended and left its place
    raise ForkError(
        f"init() in process {os.getpid()}, which rank {parent[1]} (process {parent[0]}) has started: it has inherited "
        f"its parent's place in the MPI job. Do the collective operations in the parent; put what starts the job "
        f'under `if __name__ == "__main__":`; or start the child with the environment that '
        f"collective.config.environment_outside_the_job() returns, for an mpirun of its own."
    )


def _ancestors() -> list[int]:
    found = []
    pid = os.getpid()
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:  # it has ended in the meantime, or may not be read
            break
        pid = int(stat.rpartition(")")[2].split()[1])
        found.append(pid)
    return found
