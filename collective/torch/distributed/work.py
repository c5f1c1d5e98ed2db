"""What torch.distributed's operations return: something to wait for, or to be called back by."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ... import _core
from ...errors import CollectiveError, CollectiveTimeoutError
from ...handles import Handle

__all__ = ["Completed", "Several", "Work"]

_SLICE_S = 0.1  # a wait returns to the interpreter this often, so that Ctrl-C takes effect


class _Reports:
    """The thread that completes what nobody waits for, as the engine reports it: one for an engine, once it is needed.

    Futures are completed by it: DDP's reducer sleeps on them in C++, and their callbacks run here.
    """

    def __init__(self, engine: _core.Engine) -> None:
        self.engine = engine
        self._expected: dict[_core.Ticket, Work] = {}
        threading.Thread(target=self._run, name="collective-reports", daemon=True).start()

    def expect(self, work: Work) -> None:
        """Complete it when its operation is finished: soon, if that is so already."""
        self._expected[work.ticket] = work
        if not self.engine.report(work.ticket):
            self._complete(work.ticket)

    def _run(self) -> None:
        while tickets := self.engine.take_finished():
            for ticket in tickets:
                self._complete(ticket)

    def _complete(self, ticket: _core.Ticket) -> None:
        work = self._expected.pop(ticket, None)
        if work is not None:
            work.complete()


_reports: _Reports | None = None


def _reports_of(engine: _core.Engine) -> _Reports:
    global _reports
    if _reports is None or _reports.engine is not engine:
        _reports = _Reports(engine)
    return _reports


class Work(dist.Work):
    """An operation in flight.

    Args:
        engine: that runs it.
        ticket: the engine's.
        keep: what must live until it is finished.
        results: the tensors that it writes.
        after: stores the results where the caller wants them, once the operation is finished; called once.
        timeout: how long wait() waits unless it is told; None: as long as the engine does.
    """

    def __init__(
        self,
        engine: _core.Engine,
        ticket: _core.Ticket,
        keep: Any,
        results: list[torch.Tensor],
        after: Callable[[_core.Ticket], None] | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        super().__init__()
        self.ticket = ticket
        self._handle = Handle(engine, ticket, keep, after or _nothing)
        self._engine = engine
        self._results = results
        self._timeout = timeout
        self._lock = threading.Lock()
        self._complete = False
        self._error: CollectiveError | None = None
        self._future: _Future | None = None
        if after is not None:  # whether or not the caller ever asks
            _reports_of(engine).expect(self)

    def complete(self) -> None:
        """The operation is finished: store results, note errors, tell the future; once, by the first thread here."""
        with self._lock:
            if self._complete:
                return
            try:
                self._handle.wait()
            except CollectiveError as error:
                self._error = error
            self._complete = True
            future = self._future
        if future is not None:
            _finish(future, self._error, self._results)
            future.work = None

    def is_completed(self) -> bool:
        """Whether the operation is finished, with or without an error."""
        if self.ticket.done:
            self.complete()
        return self._complete

    def is_success(self) -> bool:
        """Whether it is finished without an error."""
        return self.is_completed() and self._error is None

    def exception(self) -> CollectiveError | None:
        """What went wrong, once it is finished."""
        return self._error if self.is_completed() else None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until it is finished; for an operation on a device until its result may be used on the current stream.

        Raises:
            CollectiveTimeoutError: it was not finished within `timeout`; it goes on.
            CollectiveError: what went wrong.
        """
        if not self._complete:
            seconds = (timeout or self._timeout or timedelta()).total_seconds()  # 0: no limit, as in c10d
            if seconds > 0:
                self._wait_for(seconds)
            else:
                while not self._engine.wait(self.ticket, _SLICE_S):
                    pass
            self.complete()
        if self._error is not None:
            raise self._error
        return True

    def _wait_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._engine.wait(self.ticket, min(_SLICE_S, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise CollectiveTimeoutError(f"{self.ticket.name} did not finish within the timeout of {seconds:g} s")

    def synchronize(self) -> None:
        """wait()."""
        self.wait()

    def block_current_stream(self) -> None:
        """wait(): results of this backend are there when it returns."""
        self.wait()

    def result(self) -> list[torch.Tensor]:
        """The tensors that the operation has written."""
        self.wait()
        return self._results

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """A future of the result, which is completed on a thread of its own, or holds the error."""
        with self._lock:
            if self._future is not None:
                return self._future
            self._future = future = _Future(self)
            complete = self._complete
        if complete:
            _finish(future, self._error, self._results)
            future.work = None
        else:
            _reports_of(self._engine).expect(self)
        return future

    def source_rank(self) -> int:
        """The rank in the group from which the data came; of a receive only."""
        self.wait()
        if not self.ticket.rows:
            raise ValueError(f"{self.ticket.name} has no source rank")
        return self.ticket.rows[0]

    _source_rank = source_rank


class _Future(torch.futures.Future[list[torch.Tensor]]):
    """Waits by way of its operation: in a callback, on the thread that completes futures, it would wait for itself."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work: Work | None = work  # until it is finished

    def wait(self) -> list[torch.Tensor]:
        work = self.work
        if work is not None:
            work.wait()
        return super().wait()


def _nothing(_: _core.Ticket) -> None:
    pass


def _finish(
    future: torch.futures.Future[list[torch.Tensor]], error: CollectiveError | None, results: list[torch.Tensor]
) -> None:
    if error is not None:
        future.set_exception(error)  # type: ignore[arg-type]
    else:
        future.set_result(results)


class Completed(dist.Work):
    """An operation that was finished when it was made."""

    def __init__(self, results: list[torch.Tensor]) -> None:
        super().__init__()
        self._results = results

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def block_current_stream(self) -> None:
        pass

    def result(self) -> list[torch.Tensor]:
        return self._results

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
        future.set_result(self._results)
        return future


class Several(dist.Work):
    """Several operations as one."""

    def __init__(self, works: Sequence[Work | Completed | Several]) -> None:
        super().__init__()
        self._works = works

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        return all(work.is_success() for work in self._works)

    def exception(self) -> CollectiveError | None:
        return next((error for work in self._works if (error := work.exception()) is not None), None)

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self._works:
            work.wait(timeout) if timeout is not None else work.wait()
        return True

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def result(self) -> list[torch.Tensor]:
        return [tensor for work in self._works for tensor in work.result()]

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        def joined(all_of_them: torch.futures.Future[Any]) -> list[torch.Tensor]:
            return [tensor for future in all_of_them.value() for tensor in future.value()]

        return torch.futures.collect_all([work.get_future() for work in self._works]).then(joined)
