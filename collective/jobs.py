"""The jobs of this user on this host: sockets at which rank 0 of each tells how all its ranks are.

A socket is a file in a directory that only the user may enter: /tmp/collective-UID, because what a batch system and a
login put in XDG_RUNTIME_DIR and TMPDIR differs, and both sides must find it. Its name is rank 0's process id, after
Slurm's number of the job if there is one: "4711", "123.4711". A question is a line, its answer JSON up to the end of
the connection. A file whose process has been killed stays until somebody looks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Ended", "Entry", "directory", "entries", "listen", "other_owner"]

_PREFIX = "collective-"
_BASE = Path("/tmp")
_SECONDS = 30.0  # for an answer: rank 0 waits for all ranks that are silent


class Ended(Exception):  # noqa: N818 - it is no error of anybody's
    """Nobody listens at a socket any more."""


@dataclass(frozen=True)
class Entry:
    """A socket."""

    path: Path

    @property
    def name(self) -> str:
        """Of the job."""
        return self.path.name

    def is_called(self, job: str) -> bool:
        """Whether `job` is its name, or a part of it: Slurm's number, or the process id."""
        return job in (self.name, *self.name.split("."))

    def ask(self, question: str) -> Any:
        """Ask rank 0 a question of watching.py's.

        Raises:
            Ended: its process has ended; the socket is removed.
            OSError: it does not answer.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SECONDS)
            if not self._connect(connection):
                raise Ended(self.name)
            connection.sendall(f"{question}\n".encode())
            with connection.makefile("rb") as answer:
                text = answer.read()
        if not text:
            raise ConnectionResetError(errno.ECONNRESET, "it has closed the connection")
        return json.loads(text)

    def is_alive(self) -> bool:
        """Whether somebody listens; if not, the socket is removed."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.setblocking(False)
            try:
                return self._connect(connection)
            except BlockingIOError:  # a process that is stopped, and has been asked often
                return True

    def _connect(self, connection: socket.socket) -> bool:
        try:
            connection.connect(str(self.path))
        except (ConnectionRefusedError, FileNotFoundError):
            self.path.unlink(missing_ok=True)
            return False
        return True


def directory() -> Path:
    """Of this user's sockets."""
    return _BASE / f"{_PREFIX}{os.geteuid()}"


def other_owner(job: str) -> tuple[str, int] | None:
    """What of this name belongs to another user, in words, and to whom; None: nothing that can be seen.

    Others' directories are closed to all but root; but a process tells everybody whose it is.
    """
    me = os.geteuid()
    for other in _BASE.glob(f"{_PREFIX}*"):
        with contextlib.suppress(PermissionError, FileNotFoundError, NotADirectoryError):
            uid = other.lstat().st_uid
            if uid != me and any(Entry(path).is_called(job) for path in other.iterdir()):
                return f"job {job}", uid
    if job.isdecimal():
        with contextlib.suppress(FileNotFoundError):
            uid = Path("/proc", job).stat().st_uid
            if uid != me:
                return f"process {job}", uid
    return None


def _refuse(path: Path) -> None:
    """Raise OSError unless the directory is this user's alone: anybody may make one of this name first."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(None, f"{path} is not a directory that belongs to this user alone, with mode 0700")


def entries() -> list[Entry]:
    """This user's sockets, also those of jobs that were killed.

    Raises:
        PermissionError: their directory is not this user's alone.
    """
    own = directory()
    if not os.path.lexists(own):
        return []
    _refuse(own)
    return [Entry(path) for path in sorted(own.iterdir()) if not path.name.startswith(".") and path.is_socket()]


def listen(name: str) -> tuple[socket.socket, Path]:
    """A socket of this name that listens, and its file.

    Raises:
        OSError: it cannot be made.
    """
    own = directory()
    with contextlib.suppress(FileExistsError):
        own.mkdir(mode=0o700)
    _refuse(own)
    for entry in entries():
        entry.is_alive()  # or goes
    hidden = own / f".{name}"
    hidden.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(hidden))
        listener.listen()
        # Only now may it be seen: whoever finds a file at which nobody listens removes it.
        hidden.rename(own / name)
    except OSError:
        listener.close()
        raise
    return listener, own / name
