"""A trace of the operations as rank 0 sees them, for chrome://tracing, Perfetto and tools that read Horovod's."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from . import _core, runtime
from .config import LogLevel
from .errors import InvalidArgumentError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["flush", "give_up", "open_at_start", "record_at_start", "start_timeline", "stop_timeline"]

_WRITE_EVERY_S = 1.0

Recorded = list[tuple[str, str, bool, int, int]]  # name, kind, ran or was negotiated, microseconds: begin and duration


class _File:
    """An array of events in Chrome's JSON, complete after each addition: readable during the job and after its death.

    Written without a buffer, which a forked child would write a second time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Somebody else's link in a shared folder is not followed, and a pipe that nobody reads is not waited for.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._file = os.open(path, flags, 0o644)
            try:
                if not stat.S_ISREG(os.fstat(self._file).st_mode):
                    raise OSError(None, "it is not a regular file")
                os.ftruncate(self._file, 0)
                self._end = 0
                self._put(b"[")
            except OSError:
                os.close(self._file)
                raise
        except OSError as error:
            raise InvalidArgumentError(f"rank 0 cannot write a timeline to {path}: {error.strerror}") from None
        self._numbers: dict[str, int] = {}  # Horovod shows each tensor as a process
        self._begun = False

    def add(self, recorded: Recorded) -> None:
        """Append what the engine has recorded."""
        events: list[dict[str, object]] = []
        for name, kind, ran, begin, duration in recorded:
            if name not in self._numbers:
                self._numbers[name] = len(self._numbers)
                named = {"name": "process_name", "ph": "M", "pid": self._numbers[name], "args": {"name": name}}
                events.append(named)
            # A bucket holds gradients; all other kinds have Horovod's names.
            operation = "ALLREDUCE" if kind == "bucket" else kind.upper()
            phases = (operation, f"MPI_{operation}") if ran else (f"NEGOTIATE_{operation}",)
            span = {"ph": "X", "pid": self._numbers[name], "tid": 0, "ts": begin, "dur": duration}
            events += [{"name": phase, **span} for phase in phases]
        if events:
            self._put((b",\n" if self._begun else b"\n") + b",\n".join(json.dumps(event).encode() for event in events))
            self._begun = True

    def _put(self, content: bytes) -> None:
        """Append it, overwriting the array's end, and end the array again."""
        closed = content + b"\n]\n"
        written = 0
        while written < len(closed):
            written += os.pwrite(self._file, closed[written:], self._end + written)
        self._end += len(content)

    def close(self) -> None:
        """Nothing is added after it."""
        os.close(self._file)


class _Recording:
    """Rank 0's recording: the engine records, and a thread writes it down every second."""

    def __init__(self, engine: _core.Engine, file: _File) -> None:
        self._engine = engine
        self._file: _File | None = file
        self._writing = threading.Lock()
        self._over = threading.Event()
        engine.start_timeline()
        self._thread = threading.Thread(target=self._run, name="collective timeline", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(_WRITE_EVERY_S):
            self.flush()

    def flush(self) -> None:
        """Write down what has been recorded since the last time."""
        with self._writing:
            recorded = self._engine.take_timeline()
            if self._file is None:
                return
            try:
                self._file.add(recorded)
            except OSError as error:  # a full disk is no reason to end a training
                _core.log(LogLevel.WARNING, f"the timeline ends: {self._file.path}: {error.strerror}")
                self._engine.stop_timeline()
                self._file.close()
                self._file = None

    def stop(self) -> None:
        """Write down the rest."""
        self._engine.stop_timeline()
        self._over.set()
        self._thread.join()
        self.flush()
        if self._file is not None:
            self._file.close()


_path: Path | None = None  # of what is being recorded; on all ranks
_opened: _File | None = None  # on rank 0, while init() is under way
_recording: _Recording | None = None


def start_timeline(file_path: str | Path, mark_cycles: bool = False) -> None:
    """Start recording when operations are negotiated and when they run.

    Args:
        file_path: where rank 0 writes its trace, about once a second, until stop_timeline() or shutdown(): Chrome's
            JSON format, with Horovod's names: a process per tensor, phases NEGOTIATE_ALLREDUCE, ALLREDUCE and within
            it MPI_ALLREDUCE, and so on for all operations. An existing file is replaced, a symbolic link refused.
        mark_cycles: Horovod's; there are no cycles to mark here.

    Raises:
        InvalidArgumentError: the file cannot be written (on rank 0; the other ranks may call it or not), or a timeline
            is being recorded already.
    """
    global _path, _recording
    del mark_cycles
    state = runtime.current()
    path = Path(file_path)
    if _path is not None:
        raise InvalidArgumentError(f"a timeline is being recorded already, to {_path}")
    if state.topology.rank == 0:
        _recording = _Recording(state.engine, _File(path))
    _path = path


def stop_timeline() -> None:
    """End the recording and write the rest of it; without a recording nothing happens."""
    global _path, _recording
    runtime.current()
    _path, recording, _recording = None, _recording, None
    if recording is not None:
        recording.stop()


def flush() -> None:
    """Write down what has been recorded: this process is about to be ended. For this package's modules."""
    if _recording is not None:
        _recording.flush()


def open_at_start(comm: MPI.Intracomm, file_path: str) -> None:
    """For init(): open the file that rank 0 names, "" for none; collective, with the same errors on all ranks."""
    global _opened, _path
    error = None
    if comm.Get_rank() == 0 and file_path:
        try:
            _opened = _File(Path(file_path))
        except InvalidArgumentError as what:
            error = str(what)
    file_path, error = comm.bcast((file_path, error))
    if error is not None:
        raise InvalidArgumentError(error)
    _path = Path(file_path) if file_path else None


def record_at_start() -> None:
    """For init(): start recording to the file that is open."""
    global _opened, _recording
    if _opened is not None:
        _recording, _opened = _Recording(runtime.current().engine, _opened), None


def give_up() -> None:
    """For an init() that fails: the file that is open has nothing to say."""
    global _opened, _path
    if _opened is not None:
        _opened.close()
    _opened = _path = None
