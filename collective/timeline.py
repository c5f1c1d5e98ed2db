"""A trace of the operations as rank 0 sees them, for chrome://tracing, Perfetto and tools that read Horovod's."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import _core, recording, runtime
from .errors import InvalidArgumentError
from .event_file import EventFile

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["give_up", "open_at_start", "record_at_start", "start_timeline", "stop_timeline"]


class _File:
    """Horovod's form, in a file: each tensor is a process."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = EventFile(path, "the timeline")
        except OSError as error:
            raise InvalidArgumentError(f"rank 0 cannot write a timeline to {path}: {error.strerror}") from None
        self._origin = time.monotonic_ns()  # the engine's clock
        self._numbers: dict[str, int] = {}

    def add(self, recorded: _core.Recorded) -> bool:
        """Append what the engine has recorded."""
        events: list[dict[str, object]] = []
        for name, kind, ran, begin, end in recorded.operations():
            if name not in self._numbers:
                self._numbers[name] = len(self._numbers)
                named = {"name": "process_name", "ph": "M", "pid": self._numbers[name], "args": {"name": name}}
                events.append(named)
            # A bucket holds gradients; all other kinds have Horovod's names.
            operation = "ALLREDUCE" if kind == "bucket" else kind.upper()
            phases = (operation, f"MPI_{operation}") if ran else (f"NEGOTIATE_{operation}",)
            begin = max(begin, self._origin)  # it may have been in flight when recording began
            times = {"ts": (begin - self._origin) // 1000, "dur": (end - begin) // 1000}
            span = {"ph": "X", "pid": self._numbers[name], "tid": 0, **times}
            events += [{"name": phase, **span} for phase in phases]
        return self._file.add(b"".join(json.dumps(event).encode() + b",\n" for event in events))

    def close(self) -> None:
        """Nothing is added after it."""
        self._file.close()


_path: Path | None = None  # of what is being recorded; on all ranks
_opened: _File | None = None  # on rank 0, while init() is under way
_recorded: _File | None = None  # likewise, while it is being recorded


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
    global _path, _recorded
    del mark_cycles
    state = runtime.current()
    path = Path(file_path)
    if _path is not None:
        raise InvalidArgumentError(f"a timeline is being recorded already, to {_path}")
    if state.topology.rank == 0:
        _recorded = _File(path)
        recording.attach(state.engine, _recorded)
    _path = path


def stop_timeline() -> None:
    """End the recording and write the rest of it; without a recording nothing happens."""
    global _path, _recorded
    runtime.current()
    _path, recorded, _recorded = None, _recorded, None
    if recorded is not None:
        recording.detach(recorded)
        recorded.close()


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
    global _opened, _recorded
    if _opened is not None:
        _recorded, _opened = _opened, None
        recording.attach(runtime.current().engine, _recorded)


def give_up() -> None:
    """For an init() that fails: the file that is open has nothing to say."""
    global _opened, _path
    if _opened is not None:
        _opened.close()
    _opened = _path = None
