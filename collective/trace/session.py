"""A trace on this rank, from its start to its merging."""

from __future__ import annotations

import contextlib
import operator
import os
import stat
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _core, process, recording, runtime, steps
from ..clocks import compare
from ..config import MOST_TRACE_MB, Config, LogLevel
from ..errors import InvalidArgumentError
from ..movement import barrier
from .merge import merge
from .part import Part, path_of

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "give_up",
    "leave",
    "merge_at_end",
    "open_at_start",
    "record_at_start",
    "start_trace",
    "stop_trace",
]

_LOOK_EVERY_S = 1e-3  # while rank 0 is at work, whose core the others may share
_MIB = 1 << 20


@dataclass(frozen=True)
class _Options:
    path: Path
    steps: tuple[int, int] | None  # the first and the last to record
    max_mb: int


class _Trace:
    """This rank's part of a trace that all ranks make together.

    Args:
        options: rank 0's count.

    Raises:
        InvalidArgumentError: on all ranks, where one of them cannot write its part.
    """

    def __init__(self, comm: MPI.Intracomm, options: _Options) -> None:
        self.options: _Options = comm.bcast(options)
        self._rank, ranks = comm.Get_rank(), comm.Get_size()
        self._engine: _core.Engine | None = None
        self._is_on = False
        job = comm.bcast(uuid.uuid4().hex)
        path = self.options.path
        part: Part | None = None
        error = None
        try:
            _check_place(path)
            part = Part(path, job, self._rank, ranks, self.options.max_mb * _MIB // ranks)
        except OSError as what:
            error = f"rank {self._rank} cannot write its part of a trace to {path}: {what.strerror}"
        errors = [text for text in comm.allgather(error) if text is not None]
        if part is not None:
            self._part = part
            if errors:
                self.give_up()
        if errors:
            raise InvalidArgumentError(errors[0])
        self._compare_clocks(comm)

    def _compare_clocks(self, comm: MPI.Intracomm) -> None:
        """Collective. The processes of a node share a clock."""
        from mpi4py import MPI

        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        first = node.bcast(self._rank)
        node.Free()
        firsts = sorted(set(comm.allgather(first)))
        self._part.compare(compare(comm, firsts, time.monotonic)[firsts.index(first)])

    def begin(self, engine: _core.Engine) -> None:
        """From now on, record those of the steps that are wanted."""
        self._engine = engine
        self._record(steps.count())

    def reach(self, steps: int) -> None:
        """So many steps have been made, one of them just now."""
        assert self._engine is not None
        self._engine.end_step(steps - 1)
        self._record(steps)

    def _record(self, steps: int) -> None:
        """Record or not, as is wanted after so many steps."""
        assert self._engine is not None
        first, last = self.options.steps or (0, steps)
        wanted = first <= steps <= last
        if wanted and not self._is_on:
            recording.attach(self._engine, self._part)
        elif self._is_on and not wanted:
            recording.detach(self._part)
        self._is_on = wanted

    def end(self) -> None:
        """Write the rest of the part."""
        recording.detach(self._part)
        self._part.end()

    def merge(self, comm: MPI.Intracomm) -> None:
        """End it, and make one trace of all parts; collective. They are kept where that cannot be written."""
        recording.detach(self._part)
        self._compare_clocks(comm)
        self._part.end()
        content = b""  # of a part that somebody has removed: then merge() complains
        with contextlib.suppress(OSError):
            content = self._part.path.read_bytes()
        is_merged = False
        try:
            if self._rank == 0:
                is_merged = self._merge([content, *(comm.recv(source=rank) for rank in range(1, comm.Get_size()))])
            else:
                self._sleep_until(comm.isend(content, 0))
        finally:  # the others wait
            self._sleep_until(comm.Ibarrier())
            is_merged = comm.bcast(is_merged)
        if is_merged:
            self._part.path.unlink(missing_ok=True)

    def _merge(self, parts: list[bytes]) -> bool:
        """Whether that went well."""
        trace = self.options.path
        try:
            remarks = merge([(f"what rank {rank} has written", part) for rank, part in enumerate(parts)], trace)
        except (OSError, InvalidArgumentError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            _warn(f"there is no trace {trace}: {why}. {self._advice()}")
            return False
        if remarks:
            _warn(f"the trace {trace}: {'; '.join(remarks)}")
        return True

    @staticmethod
    def _sleep_until(request: MPI.Request) -> None:
        while not request.Test():
            time.sleep(_LOOK_EVERY_S)

    def abandon(self) -> None:
        """End it, and leave this rank's part: the others may be gone."""
        self.end()
        if self._rank == 0:
            _warn(f"the trace is left in parts, since not all ranks came to its end. {self._advice()}")

    def _advice(self) -> str:
        parts = path_of(self.options.path, 0).name.replace(".rank0.", ".rank*.")
        return f"Merge them: collective trace merge {parts} -o {self.options.path.name}"

    def give_up(self) -> None:
        """It has nothing to say."""
        self._part.end()
        self._part.path.unlink()


def _check_place(path: Path) -> None:
    """Raise OSError where a trace at this path would replace something else than a file."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise OSError(None, "it is not a regular file")


def _checked_steps(steps: Any) -> tuple[int, int] | None:
    if steps is None:
        return None
    try:
        first, last = map(operator.index, steps)
    except (TypeError, ValueError):
        first, last = 1, 0
    if not 0 <= first <= last:
        raise InvalidArgumentError(f"steps={steps!r} are not the numbers of the first and the last step")
    return first, last


def _checked_size(max_mb: Any) -> int:
    if not isinstance(max_mb, int) or not 1 <= max_mb <= MOST_TRACE_MB:
        raise InvalidArgumentError(f"max_mb={max_mb!r} is not a number of MiB from 1 to {MOST_TRACE_MB}")
    return max_mb


def _warn(text: str) -> None:
    _core.log(LogLevel.WARNING, text)


_trace: _Trace | None = None


def start_trace(file_path: str | Path, *, steps: tuple[int, int] | None = None, max_mb: int = 256) -> None:
    """Start recording on all ranks, for one trace of them all; collective.

    Until stop_trace() or shutdown() each rank writes its part about once a second, beside the path: `t.rank3.json` for
    `t.json`. Then rank 0 makes one trace of the parts, which are removed. See docs/tracing.md.

    Args:
        file_path: where rank 0 writes the trace; compressed by gzip if it ends in .gz. An existing file is replaced, a
            symbolic link refused. On every host there must be such a folder, for the parts.
        steps: record only these training steps, from the first to the last; see `mark_step`.
        max_mb: how long the parts of all ranks may become together, in MiB, 1 to 2048; what comes later is dropped.

    Rank 0's arguments hold for all ranks.

    Raises:
        InvalidArgumentError: on all ranks: a rank cannot write its part, or a trace is being recorded already; on the
            rank that gave them: `steps` or `max_mb` that are none.
    """
    global _trace
    state = runtime.current()
    options = _Options(Path(file_path), _checked_steps(steps), _checked_size(max_mb))
    if _trace is not None:
        raise InvalidArgumentError(f"a trace is being recorded already, to {_trace.options.path}")
    barrier(name="collective.start_trace")  # which tells who does not come
    _trace = _Trace(state.comm, options)
    _trace.begin(state.engine)


def stop_trace() -> None:
    """End the recording and make one trace of all ranks' parts; collective. Without a recording nothing happens."""
    global _trace
    state = runtime.current()
    if _trace is not None:
        barrier(name="collective.stop_trace")
        trace, _trace = _trace, None
        trace.merge(state.comm)


def _reach(count: int) -> None:
    if _trace is not None and not process.is_forked():  # the part is the parent's
        _trace.reach(count)


steps.when_marked.append(_reach)


def open_at_start(comm: MPI.Intracomm, config: Config) -> None:
    """For init(): open the parts of the trace that rank 0's settings name; collective, with the same errors on all."""
    global _trace
    if comm.bcast(bool(config.trace)):
        _trace = _Trace(comm, _Options(Path(config.trace), config.trace_steps, config.trace_max_mb))


def record_at_start() -> None:
    """For init(): start recording to the part that is open."""
    if _trace is not None:
        _trace.begin(runtime.current().engine)


def give_up() -> None:
    """For an init() that fails: the part that is open has nothing to say."""
    global _trace
    if _trace is not None:
        _trace.give_up()
        _trace = None


def merge_at_end(comm: MPI.Intracomm) -> None:
    """For shutdown(), where all ranks have come to it; collective."""
    global _trace
    if _trace is not None:
        trace, _trace = _trace, None
        trace.merge(comm)


def leave() -> None:
    """For shutdown(), where not all ranks have."""
    global _trace
    if _trace is not None:
        trace, _trace = _trace, None
        trace.abandon()
