"""Handles of asynchronous operations."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

from . import _core, logs
from .errors import CollectiveError, error_class

__all__ = ["Handle", "Handles"]

T = TypeVar("T")
S = TypeVar("S")

# A wait returns to the interpreter this often, so that Ctrl-C takes effect.
_SLICE_S = 0.1

# Arrays of operations that failed with the engine: MPI may go on with a transfer that could not be cancelled.
_abandoned: list[Any] = []

# Arrays of operations whose handle was dropped before they finished: the engine still reads and writes them. Any thread
# may drop one at any time, also the garbage collector within what follows: so they are appended to a list of their own.
_dropped: list[tuple[_core.Ticket, Any]] = []
_orphans: list[tuple[_core.Ticket, Any]] = []
_looking = threading.Lock()


# See show_waits().
_is_profiled: Callable[[], bool] | None = None
_range: Callable[[str], AbstractContextManager[Any]] | None = None


def show_waits(is_profiled: Callable[[], bool], range_of: Callable[[str], AbstractContextManager[Any]]) -> None:
    """While `is_profiled()`, wait within `range_of(text)`: for a framework with a profiler of its own."""
    global _is_profiled, _range
    _is_profiled, _range = is_profiled, range_of


def _look_at_orphans() -> None:
    if not _looking.acquire(blocking=False):
        return  # somebody does
    try:
        while _dropped:
            _orphans.append(_dropped.pop())
        waiting = []
        for orphan in _orphans:
            ticket, keep = orphan
            if not ticket.done:
                waiting.append(orphan)
            elif ticket.given_up:
                _abandoned.append(keep)
        _orphans[:] = waiting
    finally:
        _looking.release()


class Handle(Generic[T]):
    """An operation in flight. Keeps its arrays alive until it is finished, even when the handle is dropped."""

    __slots__ = ("_engine", "_keep", "_result", "_ticket")

    def __init__(
        self, engine: _core.Engine, ticket: _core.Ticket, keep: Any, result: Callable[[_core.Ticket], T]
    ) -> None:
        self._engine = engine
        self._ticket = ticket
        self._keep = keep
        self._result = result
        if _dropped or _orphans:
            _look_at_orphans()

    @property
    def name(self) -> str:
        """The name under which the ranks agree on the operation."""
        return self._ticket.name

    def poll(self) -> bool:
        """Whether the operation is finished; wait() then returns or raises at once."""
        return self._ticket.done

    def wait(self) -> T:
        """Block until the operation is finished and return its result; may be called again.

        Raises what went wrong, on every rank that took part: MismatchError, CollectiveTimeoutError, ShutdownError,
        InternalError.
        """
        ticket = self._ticket
        if _is_profiled is not None and _is_profiled():
            assert _range is not None
            with _range(f"wait for {ticket.name}"):
                self._block()
        else:
            self._block()
        if ticket.given_up:
            _abandoned.append(self._keep)
        if ticket.code:
            logs.flush()
            raise error_class(ticket.code)(ticket.text)
        return self._result(ticket)

    def _block(self) -> None:
        while not self._engine.wait(self._ticket, _SLICE_S):
            pass

    def map(self, function: Callable[[T], S]) -> Handle[S]:
        """A handle of the same operation, whose result is `function` applied to this one's."""
        result = self._result
        return Handle(self._engine, self._ticket, self._keep, lambda ticket: function(result(ticket)))

    def __del__(self) -> None:
        # __init__ may not have run: torch.compile makes such objects while it traces.
        if hasattr(self, "_ticket") and not self._ticket.done:
            _dropped.append((self._ticket, self._keep))


class Handles(Generic[T]):
    """Several operations in flight, as one."""

    def __init__(self, members: list[Handle[T]]) -> None:
        self._members = members

    def poll(self) -> bool:
        """Whether all of them are finished."""
        return all(member.poll() for member in self._members)

    def wait(self) -> list[T]:
        """Wait for all of them; returns the list of their results, or raises the first error when all are done."""
        errors = []
        results = []
        for member in self._members:
            try:
                results.append(member.wait())
            except CollectiveError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return results
