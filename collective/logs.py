"""What the package has to say goes through Python's logging, to the logger "collective".

Its lines come from the engine's threads, which never wait for Python: they are queued, and a thread here hands them on.
Where a program has set up no logging they go to stderr, each after "[collective]"; so they do before init() and after
shutdown(), directly.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback

from . import _core
from .config import LogLevel

__all__ = ["flush", "start", "stop"]

_LEVELS = {
    LogLevel.TRACE: 5,
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
    LogLevel.FATAL: logging.CRITICAL,
}
_END_S = 1.0

_logger = logging.getLogger("collective")
_handing_on = threading.RLock()  # one line after the other; a handler may call this package
_thread: threading.Thread | None = None


class _LastResort(logging.Handler):
    """stderr as it is now, unless the program has handlers of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if _logger.handlers != [self] or logging.getLogger().handlers:
            return
        try:
            sys.stderr.write(f"{self.format(record)}\n")  # a single write, since several ranks share one terminal
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _set_up() -> None:
    handler = _LastResort()
    handler.setFormatter(logging.Formatter("[collective] %(message)s"))
    _logger.addHandler(handler)
    logging.addLevelName(_LEVELS[LogLevel.TRACE], "TRACE")


_set_up()


def start(level: LogLevel) -> None:
    """Hand on lines of this level and above."""
    global _thread
    _core.set_log_level(level)
    _logger.setLevel(_LEVELS[level])
    _core.queue_log_lines(True)
    if _thread is not None:  # after an init() that failed
        return
    _thread = threading.Thread(target=_run, name="collective log", daemon=True)
    _thread.start()


def flush() -> None:
    """Hand on what has been said so far: an error is about to be raised, or this process about to be ended."""
    with _handing_on:
        while (line := _core.take_log_line()) is not None:
            level, text = line
            try:
                _logger.log(_LEVELS[LogLevel(level)], "%s", text)
            except Exception:  # of a handler or a filter of the program's
                traceback.print_exc()


def stop() -> None:
    """Hand on the rest. Later lines go to stderr."""
    global _thread
    _core.queue_log_lines(False)
    if _thread is not None:
        _thread.join(_END_S)
        _thread = None
    flush()


def _run() -> None:
    while _core.wait_for_log_line():
        flush()
