"""A stage that hangs ends the job, and says where it was."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Watch"]

_GRACE_S = 2.0  # for other ranks, at their limit as well, to say where they are


class Watch:
    def __init__(self) -> None:
        self._stderr = os.dup(2)  # a copy, since descriptor 2 is redirected during init()

    @contextmanager
    def stage(self, what: str, seconds: float) -> Iterator[None]:
        """End the job with status 1 if the block takes longer."""
        timer = threading.Timer(seconds, self._end, (what, seconds))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end(self, what: str, seconds: float) -> None:
        from mpi4py import MPI

        running = MPI.Is_initialized() and not MPI.Is_finalized()
        who = f"rank {MPI.COMM_WORLD.Get_rank()}" if running else f"process {os.getpid()}"
        line = f"[collective.doctor] fail: {who} has not come to the end of this within {seconds:g} s: {what}\n"
        os.write(self._stderr, line.encode())
        time.sleep(_GRACE_S)
        if running:
            MPI.COMM_WORLD.Abort(1)
        os._exit(1)
