"""Operations that reduce: allreduce, reducescatter, reduce."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from . import arrays
from ._core import Kind
from .arrays import View
from .errors import InvalidArgumentError
from .handles import Handle, Handles
from .process_sets import ProcessSet, global_process_set
from .submission import Average, Call, Compression, Op, grouped

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's own comes with Python 3.11

__all__ = [
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "reduce",
    "reduce_async",
    "reducescatter",
    "reducescatter_async",
]

ArrayT = TypeVar("ArrayT")


class Options(TypedDict, total=False):
    """The keyword arguments that every reduction takes besides the array and the operator; `allreduce` explains them.

    Each operation on one array lists them again, so that help() and editors show names and defaults rather than just
    `**options`. Those on several arrays pass them on.
    """

    name: str | None
    prescale_factor: float
    postscale_factor: float
    compression: Compression | None
    process_set: ProcessSet


How = tuple[Any, float, float, str | None]  # what is computed: operator, factors before and after, compression


def _start(call: Call, source: View, target: View, how: How) -> Handle[Any]:
    op, prescale_factor, postscale_factor, compression = how  # not *how, which is slower
    what = call.reduction(source, op, prescale_factor, postscale_factor, compression)
    ticket = call.submit(what, source, target)
    return call.handle(ticket, (source.array, target.array), lambda _: target.array)


def _allreduce(
    x: Any, in_place: bool, name: str | None, process_set: ProcessSet, caller_waits: bool, how: How
) -> Handle[Any]:
    with Call(Kind.allreduce, name, process_set, caller_waits) as call:
        if in_place:
            source = target = call.in_place(x)
        else:
            source = arrays.contiguous(call.view(x))
            target = arrays.empty_like(source)
        return _start(call, source, target, how)


def allreduce(
    x: ArrayT,
    op: Op = Average,
    *,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    compression: Compression | None = None,
    process_set: ProcessSet = global_process_set,
) -> ArrayT:
    """Reduce an array over all ranks, element by element; every rank gets the result, bit for bit the same.

    Args:
        x: array of any shape. Shape, dtype and the arguments below are the same on all ranks.
        op: Average, Sum, Min, Max, Product or Adasum. bool Sum is a logical or; Min and Max propagate NaN; Adasum
            (arXiv 2006.02924) is for floating-point types. An average is the sum, divided by the number of ranks:
            equal values average to themselves wherever their sum is exact in the type. 7 times 3.0 is; 7 times 0.1 is
            rounded, and may be off in the last bit. Sums of integers wrap modulo 2^bits, even on the way to an average,
            which is truncated toward zero: that of three uint8 of 200 is 29.
        name: matches the operations of the same name on the other ranks.
        prescale_factor: multiplies the input before the reduction.
        postscale_factor: multiplies the result.
        compression: "fp16" or "bf16": the type in which float32 and float64 travel. Other dtypes travel as they are.
            Within a node, sums of 16-bit types are computed in float32 and rounded once; between nodes they are rounded
            to the 16 bits at every rank. An average in float16 does not overflow unless its result does: where a
            partial sum could, values are first scaled by a power of two, which costs the smallest ones bits.
        process_set: the ranks that take part.

    Returns:
        A new array like `x`.

    Raises:
        MismatchError: on every rank, when ranks disagree on what must be the same.
        UnsupportedTypeError, InvalidArgumentError, DuplicateNameError: on this rank, before anything is sent.
        CollectiveTimeoutError, ShutdownError: a rank did not arrive.
    """
    result: ArrayT = _allreduce(
        x, False, name, process_set, True, (op, prescale_factor, postscale_factor, compression)
    ).wait()
    return result


def allreduce_(
    x: ArrayT,
    op: Op = Average,
    *,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    compression: Compression | None = None,
    process_set: ProcessSet = global_process_set,
) -> ArrayT:
    """Like `allreduce`, in place: `x` is contiguous, holds the result afterwards, and is returned."""
    result: ArrayT = _allreduce(
        x, True, name, process_set, True, (op, prescale_factor, postscale_factor, compression)
    ).wait()
    return result


def allreduce_async(
    x: ArrayT,
    op: Op = Average,
    *,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    compression: Compression | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle[ArrayT]:
    """Like `allreduce`, without waiting; `x` must not change until the handle is finished."""
    return _allreduce(x, False, name, process_set, False, (op, prescale_factor, postscale_factor, compression))


def allreduce_async_(
    x: ArrayT,
    op: Op = Average,
    *,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    compression: Compression | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle[ArrayT]:
    """Like `allreduce_`, without waiting; `x` must not be used until the handle is finished."""
    return _allreduce(x, True, name, process_set, False, (op, prescale_factor, postscale_factor, compression))


def _grouped(start: Callable[..., Handle[ArrayT]], xs: Sequence[ArrayT], op: Op, options: Options) -> Handles[ArrayT]:
    name = options.pop("name", None)
    each = functools.partial(start, op=op, **options)
    return grouped(lambda x, n: each(x, name=n), xs, name)


def grouped_allreduce_async(xs: Sequence[ArrayT], op: Op = Average, **options: Unpack[Options]) -> Handles[ArrayT]:
    """Like `allreduce_async`, for several arrays; the handle's result is the list of theirs."""
    return _grouped(allreduce_async, xs, op, options)


def grouped_allreduce_async_(xs: Sequence[ArrayT], op: Op = Average, **options: Unpack[Options]) -> Handles[ArrayT]:
    """Like `grouped_allreduce_async`, in place."""
    return _grouped(allreduce_async_, xs, op, options)


def grouped_allreduce(xs: Sequence[ArrayT], op: Op = Average, **options: Unpack[Options]) -> list[ArrayT]:
    """Reduce several arrays as one operation; arguments as for `allreduce`."""
    return grouped_allreduce_async(xs, op, **options).wait()


def grouped_allreduce_(xs: Sequence[ArrayT], op: Op = Average, **options: Unpack[Options]) -> list[ArrayT]:
    """Like `grouped_allreduce`, in place."""
    return grouped_allreduce_async_(xs, op, **options).wait()


def _reducescatter(x: Any, name: str | None, process_set: ProcessSet, caller_waits: bool, how: How) -> Handle[Any]:
    with Call(Kind.reducescatter, name, process_set, caller_waits) as call:
        source = arrays.contiguous(call.view(x))
        if not source.shape:
            raise InvalidArgumentError(f"{call.where}: a scalar has no first dimension to scatter")
        if how[0] == Op.Adasum:
            raise InvalidArgumentError(f"{call.where}: Adasum needs whole tensors, so it is not defined here")
        ranks, me = process_set.size(), process_set.rank()
        rows = source.shape[0] // ranks + (me < source.shape[0] % ranks)
        target = arrays.empty_like(source, (rows, *source.shape[1:]))
        return _start(call, source, target, how)


def reducescatter(
    x: ArrayT,
    op: Op = Average,
    *,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    compression: Compression | None = None,
    process_set: ProcessSet = global_process_set,
) -> ArrayT:
    """Reduce an array over all ranks and leave each its rows.

    Args:
        x: array of at least one dimension, of one shape on all ranks. Its rows are dealt out in order; the first
            `rows % size` ranks get one more than the others. The other arguments are as for `allreduce`.

    Returns:
        A new array with this rank's rows of the result. Raises like `allreduce`.
    """
    result: ArrayT = _reducescatter(
        x, name, process_set, True, (op, prescale_factor, postscale_factor, compression)
    ).wait()
    return result


def reducescatter_async(
    x: ArrayT,
    op: Op = Average,
    *,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    compression: Compression | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle[ArrayT]:
    """Like `reducescatter`, without waiting; `x` must not change until the handle is finished."""
    return _reducescatter(x, name, process_set, False, (op, prescale_factor, postscale_factor, compression))


def grouped_reducescatter_async(xs: Sequence[ArrayT], op: Op = Average, **options: Unpack[Options]) -> Handles[ArrayT]:
    """Like `reducescatter_async`, for several arrays; the handle's result is the list of theirs."""
    return _grouped(reducescatter_async, xs, op, options)


def grouped_reducescatter(xs: Sequence[ArrayT], op: Op = Average, **options: Unpack[Options]) -> list[ArrayT]:
    """Like `reducescatter`, for several arrays; returns the list of their results."""
    return grouped_reducescatter_async(xs, op, **options).wait()


def reduce_async(
    x: ArrayT,
    root_rank: int = 0,
    op: Op = Average,
    *,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    compression: Compression | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle[ArrayT | None]:
    """Like `reduce`, without waiting; `x` must not change until the handle is finished."""
    return _reduce(x, root_rank, name, process_set, False, (op, prescale_factor, postscale_factor, compression))


def _reduce(
    x: Any, root_rank: int, name: str | None, process_set: ProcessSet, caller_waits: bool, how: How
) -> Handle[Any]:
    with Call(Kind.reduce, name, process_set, caller_waits) as call:
        if how[0] == Op.Adasum:
            raise InvalidArgumentError(f"{call.where}: Adasum is defined for allreduce only")
        root = call.root(root_rank)
        source = arrays.contiguous(call.view(x))
        is_root = process_set.rank() == root
        target = arrays.empty_like(source) if is_root else source
        what = call.reduction(source, *how, root)
        ticket = call.submit(what, source, target if is_root else None)
        return call.handle(ticket, (source.array, target.array), lambda _: target.array if is_root else None)


def reduce(
    x: ArrayT,
    root_rank: int = 0,
    op: Op = Average,
    *,
    name: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    compression: Compression | None = None,
    process_set: ProcessSet = global_process_set,
) -> ArrayT | None:
    """Like `allreduce`, but only one rank gets the result.

    Args:
        root_rank: that rank, numbered among all ranks. The other arguments are as for `allreduce`.

    Returns:
        A new array like `x` on the root, None elsewhere. Raises like `allreduce`.
    """
    result: ArrayT | None = _reduce(
        x, root_rank, name, process_set, True, (op, prescale_factor, postscale_factor, compression)
    ).wait()
    return result
