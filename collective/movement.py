"""Operations that move data: broadcast, allgather, alltoall, gather, scatter, send and recv; barrier and join."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from . import arrays, runtime
from ._core import PAIR_TAGS, Kind, Ticket
from .arrays import View
from .errors import InvalidArgumentError
from .handles import Handle, Handles
from .process_sets import ProcessSet, global_process_set
from .submission import Call, grouped

__all__ = [
    "allgather",
    "allgather_async",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "gather",
    "gather_async",
    "grouped_allgather",
    "grouped_allgather_async",
    "join",
    "recv",
    "recv_async",
    "scatter",
    "scatter_async",
    "send",
    "send_async",
]

ArrayT = TypeVar("ArrayT")


class _Rows:
    """The result of an operation that made its own output: rows of the same shape and dtype as the input's."""

    def __init__(self, like: View) -> None:
        self._like = like
        self._result: Any = None

    def of(self, ticket: Ticket) -> Any:
        if self._result is None:
            shape = (sum(ticket.rows), *self._like.shape[1:])
            nbytes = int(np.prod(shape, dtype=np.int64)) * arrays.itemsize(self._like)
            self._result = arrays.from_bytes(ticket.take_output(nbytes), shape, self._like)
        return self._result


def _broadcast(
    x: Any, in_place: bool, root_rank: int, name: str | None, process_set: ProcessSet, caller_waits: bool
) -> Handle[Any]:
    with Call(Kind.broadcast, name, process_set, caller_waits) as call:
        root = call.root(root_rank)
        if in_place:
            target = call.in_place(x)
        elif process_set.rank() == root:
            target = arrays.copy(call.view(x))
        else:
            target = arrays.empty_like(call.view(x))
        ticket = call.submit(call.movement(target, root), None, target)
        return call.handle(ticket, target.array, lambda _: target.array)


def broadcast(
    x: ArrayT, root_rank: int = 0, *, name: str | None = None, process_set: ProcessSet = global_process_set
) -> ArrayT:
    """Copy an array from one rank to all.

    Args:
        x: array of any shape; shape and dtype are the same on all ranks. Only the root's contents matter.
        root_rank: the rank that sends, numbered among all ranks; the same on all.
        name: matches the operations of the same name on the other ranks.
        process_set: the ranks that take part.

    Returns:
        A new array like `x` with the root's contents. Raises like `allreduce`.
    """
    result: ArrayT = _broadcast(x, False, root_rank, name, process_set, True).wait()
    return result


def broadcast_(
    x: ArrayT, root_rank: int = 0, *, name: str | None = None, process_set: ProcessSet = global_process_set
) -> ArrayT:
    """Like `broadcast`, in place: `x` is contiguous, holds the root's contents afterwards, and is returned."""
    result: ArrayT = _broadcast(x, True, root_rank, name, process_set, True).wait()
    return result


def broadcast_async(
    x: ArrayT, root_rank: int = 0, *, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle[ArrayT]:
    """Like `broadcast`, without waiting."""
    return _broadcast(x, False, root_rank, name, process_set, False)


def broadcast_async_(
    x: ArrayT, root_rank: int = 0, *, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle[ArrayT]:
    """Like `broadcast_`, without waiting; `x` must not be used until the handle is finished."""
    return _broadcast(x, True, root_rank, name, process_set, False)


def _allgather(x: Any, name: str | None, process_set: ProcessSet, caller_waits: bool) -> Handle[Any]:
    with Call(Kind.allgather, name, process_set, caller_waits) as call:
        source = call.rows_view(x)
        ticket = call.submit(call.movement(source), source, None)
        return call.handle(ticket, source.array, _Rows(source).of)


def allgather(x: ArrayT, *, name: str | None = None, process_set: ProcessSet = global_process_set) -> ArrayT:
    """Concatenate the arrays of all ranks along the first dimension, in rank order.

    Args:
        x: array; the first dimension may differ between ranks (and be zero), the others and the dtype may not. A scalar
            counts as an array of shape (1,).
        name: matches the operations of the same name on the other ranks.
        process_set: the ranks that take part.

    Returns:
        A new array of shape (sum of first dimensions, ...). Raises like `allreduce`.
    """
    result: ArrayT = _allgather(x, name, process_set, True).wait()
    return result


def allgather_async(
    x: ArrayT, *, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle[ArrayT]:
    """Like `allgather`, without waiting; `x` must not change until the handle is finished."""
    return _allgather(x, name, process_set, False)


def grouped_allgather_async(
    xs: Sequence[ArrayT], *, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handles[ArrayT]:
    """Like `allgather_async`, for several arrays; the handle's result is the list of theirs."""
    return grouped(lambda x, n: _allgather(x, n, process_set, False), xs, name)


def grouped_allgather(
    xs: Sequence[ArrayT], *, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[ArrayT]:
    """Like `allgather`, for several arrays; returns the list of their results."""
    return grouped_allgather_async(xs, name=name, process_set=process_set).wait()


def _splits(call: Call, splits: Any, rows: int) -> list[int]:
    """Rows for each rank: even, or as given."""
    ranks = call.process_set.size()
    if splits is None:
        if rows % ranks:
            raise InvalidArgumentError(
                f"{call.where}: {rows} rows do not divide evenly among {ranks} ranks; give splits"
            )
        return [rows // ranks] * ranks
    try:
        given = [operator.index(n) for n in (splits.tolist() if hasattr(splits, "tolist") else splits)]
    except TypeError:
        raise InvalidArgumentError(f"{call.where}: splits {splits!r} are not a list of integers") from None
    if len(given) != ranks or min(given) < 0 or sum(given) != rows:
        raise InvalidArgumentError(
            f"{call.where}: splits {given} are not {ranks} numbers, none of them negative, that add up to {rows} rows"
        )
    return given


def _alltoall(
    x: Any, splits: Any, name: str | None, process_set: ProcessSet, caller_waits: bool
) -> Handle[tuple[Any, list[int]]]:
    with Call(Kind.alltoall, name, process_set, caller_waits) as call:
        source = call.rows_view(x)
        ticket = call.submit(call.movement(source), source, None, _splits(call, splits, source.shape[0]))
        rows = _Rows(source)
        return call.handle(ticket, source.array, lambda done: (rows.of(done), list(done.rows)))


def alltoall(
    x: ArrayT,
    splits: Sequence[int] | None = None,
    *,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> tuple[ArrayT, list[int]]:
    """Send rows of an array to every rank, and receive rows from every rank.

    Args:
        x: array; the first dimension may differ between ranks, the others and the dtype may not.
        splits: how many rows go to each rank, in order; they add up to the first dimension. None: equal parts.
        name: matches the operations of the same name on the other ranks.
        process_set: the ranks that take part.

    Returns:
        A new array of the received rows in rank order, and how many came from each rank. Raises like `allreduce`.
    """
    result: tuple[ArrayT, list[int]] = _alltoall(x, splits, name, process_set, True).wait()
    return result


def alltoall_async(
    x: ArrayT,
    splits: Sequence[int] | None = None,
    *,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle[tuple[ArrayT, list[int]]]:
    """Like `alltoall`, without waiting; `x` must not change until the handle is finished."""
    return _alltoall(x, splits, name, process_set, False)


def _gather(x: Any, root_rank: int, name: str | None, process_set: ProcessSet, caller_waits: bool) -> Handle[Any]:
    with Call(Kind.gather, name, process_set, caller_waits) as call:
        root = call.root(root_rank)
        source = call.rows_view(x)
        ticket = call.submit(call.movement(source, root), source, None)
        rows = _Rows(source)
        return call.handle(ticket, source.array, rows.of if process_set.rank() == root else lambda _: None)


def gather(
    x: ArrayT, root_rank: int = 0, *, name: str | None = None, process_set: ProcessSet = global_process_set
) -> ArrayT | None:
    """Like `allgather`, but only the root gets the result; None elsewhere."""
    result: ArrayT | None = _gather(x, root_rank, name, process_set, True).wait()
    return result


def gather_async(
    x: ArrayT, root_rank: int = 0, *, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle[ArrayT | None]:
    """Like `gather`, without waiting; `x` must not change until the handle is finished."""
    return _gather(x, root_rank, name, process_set, False)


def _scatter(x: Any, root_rank: int, name: str | None, process_set: ProcessSet, caller_waits: bool) -> Handle[Any]:
    with Call(Kind.scatter, name, process_set, caller_waits) as call:
        root = call.root(root_rank)
        source = call.rows_view(x)
        ticket = call.submit(call.movement(source, root), source, None)
        return call.handle(ticket, source.array, _Rows(source).of)


def scatter(
    x: ArrayT, root_rank: int = 0, *, name: str | None = None, process_set: ProcessSet = global_process_set
) -> ArrayT:
    """Deal out the rows of the root's array.

    Args:
        x: on the root, the array; elsewhere any array of the same dtype and the same shape except for the first
            dimension, such as an empty one: only its shape and dtype are looked at. The first `rows % size` ranks get
            one row more.
        root_rank: the rank that sends, numbered among all ranks; the same on all.
        name: matches the operations of the same name on the other ranks.
        process_set: the ranks that take part.

    Returns:
        A new array of this rank's rows. Raises like `allreduce`.
    """
    result: ArrayT = _scatter(x, root_rank, name, process_set, True).wait()
    return result


def scatter_async(
    x: ArrayT, root_rank: int = 0, *, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle[ArrayT]:
    """Like `scatter`, without waiting; `x` must not change until the handle is finished."""
    return _scatter(x, root_rank, name, process_set, False)


def _pair(x: Any, sends: bool, peer_rank: int, tag: int, process_set: ProcessSet, caller_waits: bool) -> Handle[Any]:
    call = Call(Kind.pair, None, process_set, caller_waits)
    verb = "send" if sends else "recv"
    where = f"rank {runtime.rank()}: {verb}"
    if not isinstance(tag, int) or not 0 <= tag < PAIR_TAGS:
        raise InvalidArgumentError(f"{where}: tag {tag!r} is not a number from 0 to {PAIR_TAGS - 1}")
    if peer_rank not in process_set.ranks or peer_rank == runtime.rank():
        raise InvalidArgumentError(f"{where}: {peer_rank!r} is not another rank of {process_set}")
    v = arrays.contiguous(call.view(x)) if sends else call.in_place(x)
    state = call.state
    ticket = state.engine.submit_pair(
        call.group,
        state.name_for(verb, call.group),
        call.movement(v),
        sends,
        process_set.ranks.index(peer_rank),
        tag,
        v.pointer,
        caller_waits,
        v.ordinal,
        v.stream,
    )
    return call.handle(ticket, v.array, lambda _: v.array)


def send(x: Any, dest_rank: int, *, tag: int = 0, process_set: ProcessSet = global_process_set) -> None:
    """Send an array to one rank, which receives it with `recv` into one of the same shape and dtype.

    Args:
        x: the array.
        dest_rank: the receiver, numbered among all ranks.
        tag: 0 to 1023; sends to one rank with one tag are received in order.
        process_set: a set that holds both ranks.

    Raises:
        MismatchError: on both ranks, when shapes or dtypes differ.
    """
    _pair(x, True, dest_rank, tag, process_set, True).wait()


def send_async(x: Any, dest_rank: int, *, tag: int = 0, process_set: ProcessSet = global_process_set) -> Handle[Any]:
    """Like `send`, without waiting; `x` must not change until the handle is finished."""
    return _pair(x, True, dest_rank, tag, process_set, False)


def recv(x: ArrayT, source_rank: int, *, tag: int = 0, process_set: ProcessSet = global_process_set) -> ArrayT:
    """Receive into a contiguous array what `source_rank` sends with `send`; returns the array."""
    result: ArrayT = _pair(x, False, source_rank, tag, process_set, True).wait()
    return result


def recv_async(
    x: ArrayT, source_rank: int, *, tag: int = 0, process_set: ProcessSet = global_process_set
) -> Handle[ArrayT]:
    """Like `recv`, without waiting; `x` must not be used until the handle is finished."""
    return _pair(x, False, source_rank, tag, process_set, False)


def barrier(*, name: str | None = None, process_set: ProcessSet = global_process_set) -> None:
    """Wait until every rank of the set has called it."""
    with Call(Kind.barrier, name, process_set, True) as call:
        call.handle(call.submit(call.movement(None), None, None), None, lambda _: None).wait()


def join(*, process_set: ProcessSet = global_process_set) -> int:
    """Say that this rank has run out of data, and help the others until they have too.

    Until every rank of the set has joined, this one makes neutral contributions to whatever they do: zeros (the
    identity of Min, Max and Product) in reductions, including those of a DistributedOptimizer, and no rows in gathers
    and exchanges. Averages still divide by the number of all ranks. An operation whose root has joined raises
    MismatchError on the others.

    Returns:
        The rank that joined last, numbered among all ranks.
    """
    state = runtime.current()
    group = process_set.group
    if group is None:
        raise InvalidArgumentError(f"rank {runtime.rank()}: join: this rank is not in {process_set}")
    ticket = state.engine.submit_join(group, "join", arrays.current_streams(state.prepared_devices))
    last: int = Handle(state.engine, ticket, None, lambda done: done.rows[0]).wait()
    state.restart_names(group)
    process_set.joins += 1
    return process_set.ranks[last]
