"""The collective operations, over any array.

Names: operations of all ranks meet by name. Without one, the n-th unnamed call of an operation on one rank meets the
n-th on the others, so unnamed calls must come in the same order everywhere; named ones may come in any order.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Literal, TypeVar

import numpy as np

from . import arrays, runtime
from ._core import DType, Kind, ReduceOp, Ticket
from .arrays import View
from .errors import InvalidArgumentError, UnsupportedTypeError
from .handles import Handle

__all__ = [
    "Average",
    "Compression",
    "Max",
    "Min",
    "Op",
    "Product",
    "Sum",
    "allgather",
    "allgather_async",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
]

ArrayT = TypeVar("ArrayT")
Compression = Literal["fp16", "bf16"]


class Op(IntEnum):
    """Reduction operators, with Horovod's numbers."""

    Average = 0
    Sum = 1
    Min = 3
    Max = 4
    Product = 5


Average, Sum, Min, Max, Product = Op.Average, Op.Sum, Op.Min, Op.Max, Op.Product

_CORE_OPS: dict[Op, ReduceOp] = {op: getattr(ReduceOp, op.name) for op in Op}
_WIRE = {"fp16": DType.float16, "bf16": DType.bfloat16}
_COMPRESSIBLE = (DType.float32, DType.float64)
_COMPLEX = (DType.complex64, DType.complex128)


def _where(kind: Kind, name: str | None) -> str:
    """How an error names the operation."""
    return f"rank {runtime.rank()}: {kind.name} {repr(name) if name else '(unnamed)'}"


def _submit(
    kind: Kind,
    name: str | None,
    source: View | None,
    target: View | None,
    *,
    op: Op = Sum,
    wire: DType | None = None,
    prescale: float = 1.0,
    postscale: float = 1.0,
    root: int = 0,
    caller_waits: bool,
) -> Ticket:
    state = runtime.current()
    shown = source or target
    dtype = shown.dtype if shown else DType.uint8
    return state.engine.submit(
        kind,
        name or state.name_for(kind.name),
        shown.shape if shown else (),
        dtype,
        wire or dtype,
        _CORE_OPS[op],
        prescale,
        postscale,
        root,
        shown.device if shown else "cpu",
        "",
        source.pointer if source else 0,
        target.pointer if target else 0,
        name is not None,
        caller_waits,
    )


def _in_place(kind: Kind, name: str | None, x: Any) -> View:
    v = arrays.view(x)
    if v.array is not x:
        raise UnsupportedTypeError(f"{_where(kind, name)}: a {type(x).__qualname__} cannot be changed in place")
    if not v.contiguous:
        raise InvalidArgumentError(f"{_where(kind, name)}: in place needs a contiguous array; make a copy first")
    if isinstance(x, np.ndarray) and not x.flags.writeable:
        raise InvalidArgumentError(f"{_where(kind, name)}: in place needs a writeable array")
    return v


def checked_op(op: Any) -> Op:
    """The operator for what a caller gave; raises InvalidArgumentError."""
    try:
        return Op(op)
    except ValueError:
        raise InvalidArgumentError(f"rank {runtime.rank()}: op {op!r} is none of {', '.join(Op.__members__)}") from None


def _op_for(op: Any, dtype: DType, name: str | None) -> Op:
    checked = checked_op(op)
    if (dtype == DType.bool and checked is Average) or (dtype in _COMPLEX and checked in (Min, Max)):
        raise UnsupportedTypeError(f"{_where(Kind.allreduce, name)}: op {checked.name} is not defined for {dtype.name}")
    return checked


def reduce_op(op: Op) -> ReduceOp:
    """The engine's operator."""
    return _CORE_OPS[op]


def wire_dtype(compression: str | None, dtype: DType) -> DType:
    """The type in which elements of `dtype` travel."""
    if compression is None:
        return dtype
    if compression not in _WIRE:
        raise InvalidArgumentError(
            f"rank {runtime.rank()}: compression {compression!r} is none of None, {', '.join(map(repr, _WIRE))}"
        )
    return _WIRE[compression] if dtype in _COMPRESSIBLE else dtype


def _allreduce(
    x: Any,
    in_place: bool,
    op: Any,
    name: str | None,
    prescale_factor: float,
    postscale_factor: float,
    compression: str | None,
    caller_waits: bool,
) -> Handle[Any]:
    state = runtime.current()
    if in_place:
        source = target = _in_place(Kind.allreduce, name, x)
    else:
        source = arrays.contiguous(arrays.view(x))
        target = arrays.empty_like(source)
    if source.dtype == DType.bool and not prescale_factor == postscale_factor == 1.0:
        raise UnsupportedTypeError(f"{_where(Kind.allreduce, name)}: factors are not defined for bool")
    ticket = _submit(
        Kind.allreduce,
        name,
        source,
        target,
        op=_op_for(op, source.dtype, name),
        wire=wire_dtype(compression, source.dtype),
        prescale=float(prescale_factor),
        postscale=float(postscale_factor),
        caller_waits=caller_waits,
    )
    return Handle(state.engine, ticket, (source.array, target.array), lambda _: target.array)


def allreduce(
    x: ArrayT,
    op: Op = Average,
    *,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    compression: Compression | None = None,
) -> ArrayT:
    """Reduce an array over all ranks, element by element; every rank gets the result, bit for bit the same.

    Args:
        x: array of any shape. Shape, dtype and the arguments below are the same on all ranks.
        op: Average, Sum, Min, Max or Product. Integer averages are truncated toward zero; bool Sum is a logical or;
            Min and Max propagate NaN.
        name: meets the operations of the same name on the other ranks.
        prescale_factor: multiplies the input before the reduction.
        postscale_factor: multiplies the result.
        compression: "fp16" or "bf16": the type in which float32 and float64 travel; sums are rounded to it at every
            rank. Other dtypes travel as they are.

    Returns:
        A new array like `x`.

    Raises:
        MismatchError: on every rank, when ranks disagree on what must be the same.
        UnsupportedTypeError, InvalidArgumentError, DuplicateNameError: on this rank, before anything is sent.
        CollectiveTimeoutError, ShutdownError: a rank did not come.
    """
    handle = _allreduce(x, False, op, name, prescale_factor, postscale_factor, compression, True)
    result: ArrayT = handle.wait()
    return result


def allreduce_(
    x: ArrayT,
    op: Op = Average,
    *,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    compression: Compression | None = None,
) -> ArrayT:
    """Like `allreduce`, in place: `x` is contiguous, holds the result afterwards, and is returned."""
    result: ArrayT = _allreduce(x, True, op, name, prescale_factor, postscale_factor, compression, True).wait()
    return result


def allreduce_async(
    x: ArrayT,
    op: Op = Average,
    *,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    compression: Compression | None = None,
) -> Handle[ArrayT]:
    """Like `allreduce`, without waiting; `x` must not change until the handle is finished."""
    return _allreduce(x, False, op, name, prescale_factor, postscale_factor, compression, False)


def allreduce_async_(
    x: ArrayT,
    op: Op = Average,
    *,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    compression: Compression | None = None,
) -> Handle[ArrayT]:
    """Like `allreduce_`, without waiting; `x` must not be used until the handle is finished."""
    return _allreduce(x, True, op, name, prescale_factor, postscale_factor, compression, False)


def _broadcast(x: Any, in_place: bool, root_rank: int, name: str | None, caller_waits: bool) -> Handle[Any]:
    state = runtime.current()
    ranks = state.topology.size
    if isinstance(root_rank, bool) or not isinstance(root_rank, (int, np.integer)) or not 0 <= root_rank < ranks:
        raise InvalidArgumentError(
            f"{_where(Kind.broadcast, name)}: root_rank {root_rank!r} is not a rank from 0 to {ranks - 1}"
        )
    if in_place:
        target = _in_place(Kind.broadcast, name, x)
    elif state.topology.rank == root_rank:
        target = arrays.copy(arrays.view(x))
    else:
        target = arrays.empty_like(arrays.view(x))
    ticket = _submit(Kind.broadcast, name, None, target, root=int(root_rank), caller_waits=caller_waits)
    return Handle(state.engine, ticket, target.array, lambda _: target.array)


def broadcast(x: ArrayT, root_rank: int = 0, *, name: str | None = None) -> ArrayT:
    """Copy an array from one rank to all.

    Args:
        x: array of any shape; shape and dtype are the same on all ranks. Only the root's contents matter.
        root_rank: the rank that sends, the same on all ranks.
        name: meets the operations of the same name on the other ranks.

    Returns:
        A new array like `x` with the root's contents. Raises like `allreduce`.
    """
    result: ArrayT = _broadcast(x, False, root_rank, name, True).wait()
    return result


def broadcast_(x: ArrayT, root_rank: int = 0, *, name: str | None = None) -> ArrayT:
    """Like `broadcast`, in place: `x` is contiguous, holds the root's contents afterwards, and is returned."""
    result: ArrayT = _broadcast(x, True, root_rank, name, True).wait()
    return result


def broadcast_async(x: ArrayT, root_rank: int = 0, *, name: str | None = None) -> Handle[ArrayT]:
    """Like `broadcast`, without waiting."""
    return _broadcast(x, False, root_rank, name, False)


def broadcast_async_(x: ArrayT, root_rank: int = 0, *, name: str | None = None) -> Handle[ArrayT]:
    """Like `broadcast_`, without waiting; `x` must not be used until the handle is finished."""
    return _broadcast(x, True, root_rank, name, False)


def _allgather(x: Any, name: str | None, caller_waits: bool) -> Handle[Any]:
    state = runtime.current()
    source = arrays.contiguous(arrays.view(x))
    if not source.shape:
        source.shape = (1,)  # scalars become a vector of one per rank
    ticket = _submit(Kind.allgather, name, source, None, caller_waits=caller_waits)
    result: list[Any] = []

    def assemble(done: Ticket) -> Any:
        if not result:
            rows = sum(done.rows)
            shape = (rows, *source.shape[1:])
            nbytes = int(np.prod(shape, dtype=np.int64)) * _itemsize(source)
            result.append(arrays.from_bytes(done.take_output(nbytes), shape, source))
        return result[0]

    return Handle(state.engine, ticket, source.array, assemble)


def _itemsize(v: View) -> int:
    itemsize = v.array.itemsize
    return int(itemsize() if callable(itemsize) else itemsize)


def allgather(x: ArrayT, *, name: str | None = None) -> ArrayT:
    """Concatenate the arrays of all ranks along the first dimension, in rank order.

    Args:
        x: array; the first dimension may differ between ranks (also zero), the others and the dtype may not. A scalar
            counts as an array of shape (1,).
        name: meets the operations of the same name on the other ranks.

    Returns:
        A new array of shape (sum of first dimensions, ...). Raises like `allreduce`.
    """
    result: ArrayT = _allgather(x, name, True).wait()
    return result


def allgather_async(x: ArrayT, *, name: str | None = None) -> Handle[ArrayT]:
    """Like `allgather`, without waiting; `x` must not change until the handle is finished."""
    return _allgather(x, name, False)


def barrier(*, name: str | None = None) -> None:
    """Wait until every rank has called it."""
    state = runtime.current()
    ticket = _submit(Kind.barrier, name, None, None, caller_waits=True)
    Handle(state.engine, ticket, None, lambda _: None).wait()
