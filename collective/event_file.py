"""A file of events in Chrome's JSON, for chrome://tracing and Perfetto."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from . import _core
from .config import LogLevel

__all__ = ["EventFile"]


class EventFile:
    """An array of events, one a line, complete after each addition: readable during the job and after its death.

    Written without a buffer, which a forked child would write a second time.

    Args:
        path: an existing file is replaced; OSError where that cannot be.
        what: what a warning calls it.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._what = what
        # Somebody else's link in a shared folder is not followed, and a pipe that nobody reads is not waited for.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        self._file: int | None = os.open(path, flags, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise OSError(None, "it is not a regular file")
            os.ftruncate(self._file, 0)
            self._end = 0
            self._begun = False
            self._put(b"[")
        except OSError:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """How long it is."""
        return self._end

    def add(self, lines: bytes) -> bool:
        r"""Append events, each of which ends in ",\n"; False if the file can grow no more, which a warning has told."""
        if lines and self._file is not None:
            try:
                self._put((b",\n" if self._begun else b"\n") + lines[:-2])
            except OSError as error:  # a full disk is no reason to end a training
                _core.log(LogLevel.WARNING, f"{self._what} ends: {self.path}: {error.strerror}")
                self.close()
            self._begun = True
        return self._file is not None

    def _put(self, content: bytes) -> None:
        """Append it, overwriting the array's end, and end the array again."""
        assert self._file is not None
        closed = content + b"\n]\n"
        written = 0
        while written < len(closed):
            written += os.pwrite(self._file, closed[written:], self._end + written)
        self._end += len(content)

    def close(self) -> None:
        """Nothing is added after it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
