"""What torch.distributed's operations return: something to wait for, or to be called back by."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ... import _core, runtime
from ...errors import CollectiveTimeoutError
from ...handles import Handle
from ...runtime import Runtime

__all__ = ["Completed", "Several", "Work"]

_MOST_THREADS = 64
_END_S = 1.0
_SLICE_S = 0.1  # a wait returns to the interpreter this often, so that Ctrl-C takes effect


class _Reports:
    """The threads that complete what nobody waits for, as the engine reports it; one set for each engine.

    Futures are completed by them: DDP's reducer sleeps on futures in C++, and their callbacks run here. A callback may
    wait for another operation, so there is always one more thread than are busy.
    """

    def __init__(self, state: Runtime) -> None:
        self.engine = state.engine
        self._expected: dict[_core.Ticket, Work] = {}
        self._lock = threading.Lock()
        self._idle = 0
        self._threads: list[threading.Thread] = []
        state.at_end.append(self._join)
        self._start()

    def expect(self, work: Work) -> None:
        """Complete it when its operation is finished: soon, if that is so already."""
        self._expected[work.ticket] = work
        if not self.engine.report(work.ticket):
            self._complete(work.ticket)

    def _start(self) -> None:
        self._idle += 1
        thread = threading.Thread(target=self._run, name="collective-reports", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        while (ticket := self.engine.take_finished()) is not None:
            with self._lock:
                self._idle -= 1
                if self._idle == 0 and len(self._threads) < _MOST_THREADS:
                    self._start()
            self._complete(ticket)
            with self._lock:
                self._idle += 1

    def _complete(self, ticket: _core.Ticket) -> None:
        work = self._expected.pop(ticket, None)
        if work is not None:
            work.complete()

    def _join(self) -> None:
        """At the runtime's end, unless a callback hangs: a thread that comes back from C++ while the interpreter ends
        would bring it down. The engine is let go."""
        global _reports
        with _making:
            if _reports is self:
                _reports = None
        for thread in self._threads:
            if thread is not threading.current_thread():  # a callback may end the runtime
                thread.join(_END_S)


_reports: _Reports | None = None
_making = threading.Lock()


def _reports_of(engine: _core.Engine) -> _Reports:
    global _reports
    with _making:
        if _reports is None or _reports.engine is not engine:
            _reports = _Reports(runtime.current())
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
        self._stores = after is not None
        self._timeout = timeout
        self._lock = threading.Lock()
        self._complete = False
        self._error: Exception | None = None
        self._promise: torch.futures.Future[list[torch.Tensor]] | None = None
        self._future: torch.futures.Future[list[torch.Tensor]] | None = None
        if after is not None:  # whether or not the caller ever asks
            _reports_of(engine).expect(self)

    def complete(self) -> None:
        """The operation is finished: store results, note errors, tell the future; once, by the first thread here."""
        with self._lock:
            if self._complete:
                return
            try:
                with torch.no_grad():
                    self._handle.wait()
                    if self._stores and self._results[0].is_cuda:  # on the stream of whichever thread this is
                        torch.cuda.current_stream(self._results[0].device).synchronize()
            except Exception as error:  # whatever it is, it belongs to those who wait
                self._error = error
            self._complete = True
            promise = self._promise
        if promise is not None:
            promise.set_result(self._results)

    def is_completed(self) -> bool:
        """Whether the operation is finished, with or without an error."""
        if self.ticket.done:
            self.complete()
        return self._complete

    def is_success(self) -> bool:
        """Whether it is finished without an error."""
        return self.is_completed() and self._error is None

    def exception(self) -> Exception | None:
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
        """A future of the result, which is completed on another thread, or holds the error."""
        with self._lock:
            if self._future is not None:
                return self._future
            # An error must reach those who wait in C++ as well: set_exception() is seen by Python alone.
            promise: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
            future = promise.then(self._checked)
            self._promise, self._future = promise, future
            complete = self._complete
        if complete:
            promise.set_result(self._results)
        else:
            _reports_of(self._engine).expect(self)
        return future

    def _checked(self, _: torch.futures.Future[list[torch.Tensor]]) -> list[torch.Tensor]:
        if self._error is not None:
            raise self._error
        return self._results

    def source_rank(self) -> int:
        """The rank in the group from which the data came; of a receive only."""
        self.wait()
        if not self.ticket.rows:
            raise ValueError(f"{self.ticket.name} has no source rank")
        return self.ticket.rows[0]

    _source_rank = source_rank


def _nothing(_: _core.Ticket) -> None:
    pass


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

    def exception(self) -> Exception | None:
        return next((error for work in self._works if (error := work.exception()) is not None), None)

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self._works:
            work.wait(timeout)
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
