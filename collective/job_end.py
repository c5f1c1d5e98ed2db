"""How an uncaught exception ends a rank, and the job with it, so that the first error is the last one printed."""

from __future__ import annotations

import io
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType

from .errors import ShutdownError

__all__ = ["install"]

_GRACE_S = 5.0  # for the rank that ended first to terminate
_BEHIND_S = 0.5  # for the launcher to see its status before ours


def install(
    place: Callable[[], tuple[int, int] | None], shutdown: Callable[[], None], last_words: Callable[[], None]
) -> None:
    """Have uncaught exceptions end the job.

    Args:
        place: gives this rank and the number of ranks; None: the runtime is not initialised here.
        shutdown: ends the runtime.
        last_words: writes down what is to be kept of a job that is aborted.
    """
    previous = sys.excepthook

    def end_job(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        where = place()
        if where is not None and where[1] > 1 and isinstance(error, ShutdownError):
            _end_behind(where[0], error, trace, shutdown)
            return
        previous(kind, error, trace)
        if where is None:
            return
        rank, ranks = where
        sys.stdout.flush()
        if ranks > 1:
            print(
                f"[collective] rank {rank}: uncaught {kind.__name__}, ending the job of {ranks} ranks", file=sys.stderr
            )
            _flush()
            last_words()
            _abort()

    sys.excepthook = end_job


def _end_behind(rank: int, error: ShutdownError, trace: TracebackType | None, shutdown: Callable[[], None]) -> None:
    """End because another rank has: in one line, as that one says why; and after it, as its status is the job's.

    If that rank does not terminate, this one aborts the job.
    """
    at = next((f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(trace)), "unknown place")
    sys.stdout.flush()
    print(f"[collective] rank {rank} ends: {at}: ShutdownError: {error}", file=sys.stderr)
    _flush()
    limit = threading.Timer(_GRACE_S, _abort)
    limit.daemon = True
    limit.start()
    shutdown()
    from mpi4py import MPI

    MPI.Finalize()
    time.sleep(_BEHIND_S)
    limit.cancel()


def _flush() -> None:
    # A hook around ours may hold back what it prints (torch.distributed's does), and never get to show it.
    if isinstance(sys.stderr, io.StringIO) and sys.__stderr__ is not None:
        sys.__stderr__.write(sys.stderr.getvalue())
        sys.__stderr__.flush()
    sys.stderr.flush()


def _abort() -> None:
    from mpi4py import MPI

    if not MPI.Is_finalized():
        MPI.COMM_WORLD.Abort(1)
