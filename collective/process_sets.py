"""Process sets: groups of ranks with collectives of their own, which do not wait for other groups'."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from . import runtime
from .errors import InvalidArgumentError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "ProcessSet",
    "forget_all",
    "free_communicators",
    "global_process_set",
    "register",
    "register_global",
    "registered",
    "unregister",
]


class ProcessSet:
    """Some of the ranks.

    Args:
        ranks_or_comm: ranks of the runtime in any order (a set keeps them in increasing order), in a list, a range or
            any other iterable; or an mpi4py communicator whose group they form. All ranks create equal sets.

    A set works once it is registered, by `init(process_sets=[...])` or `add_process_set`, until shutdown(); it can be
    registered again after the next init().

    Raises:
        InvalidArgumentError: neither a communicator nor whole numbers.
    """

    process_set_id: int | None = None
    """The set's number, equal on all ranks; None while it is not registered."""

    def __init__(self, ranks_or_comm: Iterable[int] | MPI.Comm) -> None:
        self._given = _listed(ranks_or_comm)
        self._ranks: list[int] | None = None  # while it is registered
        self._group: int | None = None
        self._comm: Any = None
        self.joins = 0  # how often all its ranks have joined; for this package's modules

    @property
    def ranks(self) -> list[int]:
        """The ranks of the set, increasing."""
        return self._resolved() if self._ranks is None else self._ranks

    @property
    def group(self) -> int | None:
        """The engine's number for the set; None on ranks that are not in it. For this package's modules."""
        if self.process_set_id is None:
            if self is global_process_set:
                runtime.current()  # raises what is wrong: not initialised, or forked
            raise InvalidArgumentError(f"{self} is not registered: call add_process_set() on all ranks first")
        return self._group

    @property
    def mpi_comm(self) -> Any:
        """The set's mpi4py communicator; None on ranks that are not in it, or before registration."""
        return self._comm

    def size(self) -> int:
        """How many ranks the set has."""
        return len(self.ranks)

    def rank(self) -> int:
        """This rank's number within the set; -1 if it is not in it."""
        me = runtime.rank()
        return self.ranks.index(me) if me in self.ranks else -1

    def included(self) -> bool:
        """Whether this rank is in the set."""
        return runtime.rank() in self.ranks

    def __repr__(self) -> str:
        name = "global process set" if self is global_process_set else "process set"
        ranks = self._given if self._ranks is None else self._ranks
        shown = f" {ranks}" if isinstance(ranks, list) and ranks else ""
        return name + shown

    def __deepcopy__(self, memo: Any) -> ProcessSet:
        return self  # models that hold it may be copied

    def __reduce__(self) -> Any:
        if self is global_process_set:
            return "global_process_set"
        return _unpickled, (self._given if isinstance(self._given, list) else self.ranks,)

    def _resolved(self) -> list[int]:
        """The given ranks, as this runtime numbers them."""
        size = runtime.size()
        if isinstance(self._given, list):
            ranks = sorted(self._given)
        else:
            from mpi4py import MPI

            mine = self._given.Get_group()
            everyone = runtime.current().comm.Get_group()
            ranks = sorted(MPI.Group.Translate_ranks(mine, list(range(mine.Get_size())), everyone))
        if not ranks or len(set(ranks)) < len(ranks) or not all(0 <= rank < size for rank in ranks):
            raise InvalidArgumentError(f"a process set takes distinct ranks from 0 to {size - 1}, not {ranks}")
        return ranks

    def _release(self) -> None:
        self.process_set_id = None
        self._ranks = self._group = self._comm = None
        self.joins = 0


def _listed(given: Iterable[int] | MPI.Comm) -> list[int] | MPI.Comm:
    """The ranks as a list, or the communicator."""
    if hasattr(given, "Get_group"):
        return cast("MPI.Comm", given)
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise InvalidArgumentError(f"a process set takes ranks or an mpi4py communicator, not {given!r}")
    ranks = []
    for rank in given:
        try:
            ranks.append(operator.index(rank))
        except TypeError:
            raise InvalidArgumentError(f"a process set takes whole numbers as ranks, not {rank!r}") from None
        if isinstance(rank, bool):  # it converts to an integer, but nobody means it as a rank
            raise InvalidArgumentError(f"a process set takes whole numbers as ranks, not {rank!r}")
    return ranks


global_process_set = ProcessSet([])
_registered: dict[int, ProcessSet] = {}


def _unpickled(ranks: list[int]) -> ProcessSet:
    """The registered set of these ranks, or a new one."""
    known = (process_set for process_set in _registered.values() if process_set.ranks == ranks)
    return next(known, None) or ProcessSet(ranks)


def registered() -> list[ProcessSet]:
    """The sets that are registered, the global one first. Like the functions below, for lifecycle.py."""
    return list(_registered.values())


def register(
    process_set: ProcessSet, number: int, ranks: list[int], group: int | None, comm: MPI.Intracomm | None
) -> None:
    """Make a set usable under this number; group and communicator are None on ranks that are not in it."""
    process_set.process_set_id = number
    process_set._ranks = ranks
    process_set._group = group
    process_set._comm = comm
    _registered[number] = process_set


def register_global() -> None:
    """Called by init(): the global set holds all ranks."""
    _registered.clear()
    register(global_process_set, 0, list(range(runtime.size())), 0, runtime.current().comm)


def unregister(process_set: ProcessSet) -> None:
    """Make a registered set unusable."""
    assert process_set.process_set_id is not None
    del _registered[process_set.process_set_id]
    process_set._release()


def free_communicators() -> None:
    """Called by shutdown() if that was orderly: freeing is collective."""
    for process_set in _registered.values():
        if process_set is not global_process_set and process_set._comm is not None:
            process_set._comm.Free()


def forget_all() -> None:
    """Called by shutdown()."""
    for process_set in _registered.values():
        process_set._release()
    _registered.clear()
