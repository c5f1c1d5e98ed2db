"""The collective operations on tensors, with Horovod's names and argument order.

Names ending in `_` work in place; names with `async` return a handle for `synchronize`; the others return a new tensor
and are differentiable, with gradients scaled as in Horovod (autograd.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import ops as _ops
from .. import runtime
from ..errors import CollectiveError, InvalidArgumentError, UnsupportedTypeError
from ..handles import Handle, Handles
from ..process_sets import ProcessSet, global_process_set
from ..reductions import Options
from ..submission import Average, Sum, checked_op
from . import autograd
from .compression import Compression, Compressor, compressed, compressed_group, wire_of

__all__ = [
    "allgather",
    "allgather_async",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
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
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "join",
    "poll",
    "recv",
    "recv_async",
    "reduce",
    "reduce_async",
    "reducescatter",
    "reducescatter_async",
    "scatter",
    "scatter_async",
    "send",
    "send_async",
    "sparse_allreduce_async",
    "synchronize",
]

Tensor = torch.Tensor
TensorHandle = Handle[torch.Tensor]
TensorHandles = Handles[torch.Tensor]


def _op_of(average: bool | None, op: int | None) -> Any:
    """Horovod's `average=` argument is older than `op=`; at most one of them may be given.

    An error in them is returned in place of an operator: the call raises it, so that the other ranks learn of it.
    """
    if average is None:
        return Average if op is None else op
    if op is not None:
        return InvalidArgumentError("average= and op= were both given; op= alone says it all")
    if average not in (True, False):
        return InvalidArgumentError(f"average={average!r} is neither True nor False; op= takes operators")
    return Average if average else Sum


def _options(name: str | None, prescale_factor: float, postscale_factor: float, process_set: ProcessSet) -> Options:
    """As keyword arguments of a reduction. Horovod scripts pass them by position, so each function here lists them."""
    return {
        "name": name,
        "prescale_factor": prescale_factor,
        "postscale_factor": postscale_factor,
        "process_set": process_set,
    }


# ---- allreduce ----


def allreduce_async(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> TensorHandle:
    """Start an `allreduce` into a new tensor."""
    return _ops.allreduce_async(
        tensor, _op_of(average, op), **_options(name, prescale_factor, postscale_factor, process_set)
    )


def allreduce_async_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> TensorHandle:
    """Start an `allreduce` in place on a contiguous tensor."""
    return _ops.allreduce_async_(
        tensor, _op_of(average, op), **_options(name, prescale_factor, postscale_factor, process_set)
    )


def allreduce(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Reduce a tensor over all ranks (by Average unless `op` says otherwise); differentiable for Average and Sum.

    Shape, dtype and arguments are the same on all ranks; `collective.allreduce` documents the rest, including rounding.
    """
    options = autograd.ReduceOptions(
        _op_of(average, op), prescale_factor, postscale_factor, wire_of(compression), process_set
    )
    return compressed(compression, tensor, lambda sent: autograd.allreduce(sent, options, name))


def allreduce_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Like `allreduce`, in place on a contiguous tensor, which is returned."""
    return _ops.allreduce_(
        tensor, _op_of(average, op), **_options(name, prescale_factor, postscale_factor, process_set)
    )


def grouped_allreduce_async(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> TensorHandles:
    """Start an `allreduce` of several tensors; `synchronize` returns the list of results."""
    return _ops.grouped_allreduce_async(
        tensors, _op_of(average, op), **_options(name, prescale_factor, postscale_factor, process_set)
    )


def grouped_allreduce_async_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> TensorHandles:
    """Like `grouped_allreduce_async`, in place."""
    return _ops.grouped_allreduce_async_(
        tensors, _op_of(average, op), **_options(name, prescale_factor, postscale_factor, process_set)
    )


def grouped_allreduce(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Reduce several tensors as one operation; differentiable like `allreduce`."""
    options = autograd.ReduceOptions(
        _op_of(average, op), prescale_factor, postscale_factor, wire_of(compression), process_set
    )
    return compressed_group(compression, tensors, lambda sent: autograd.grouped_allreduce(sent, options, name))


def grouped_allreduce_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Like `grouped_allreduce`, in place."""
    return grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set).wait()


def sparse_allreduce_async(
    tensor: Tensor,
    name: str | None = None,
    op: int | None = None,
    process_set: ProcessSet = global_process_set,
) -> Callable[[], Tensor]:
    """Start the reduction of a sparse COO tensor by gathering indices and values; returns a callable that waits.

    Args:
        tensor: sparse; shape and dtype are the same on all ranks, the non-zero elements need not be.
        op: Average or Sum.

    Returns:
        A function that takes no arguments and returns the reduced tensor, coalesced. `synchronize` takes it, too.
    """
    handles = _ops.grouped_allgather_async(_coordinates(tensor, op), name=name, process_set=process_set)

    def finish() -> Tensor:
        indices, values = handles.wait()
        gathered = torch.sparse_coo_tensor(indices.t(), values, tensor.shape, check_invariants=True).coalesce()
        return gathered if op == Sum else gathered / process_set.size()

    return finish


def _coordinates(tensor: Tensor, op: int | None) -> list[Any]:
    """A sparse tensor's indices, a row each, and values; or an error in place of both."""
    try:
        if op not in (None, Average, Sum):
            raise InvalidArgumentError(
                f"sparse_allreduce_async reduces by Average or Sum, not by {checked_op(op).name}"
            )
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.sparse_coo:
            what = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__qualname__
            raise UnsupportedTypeError(f"sparse_allreduce_async takes a sparse COO tensor, not {what}")
        given = tensor.detach().coalesce()
        # Rows first, since the number of non-zero elements is what differs between ranks.
        return [given.indices().t().contiguous(), given.values()]
    except CollectiveError as error:
        return [error, error]


# ---- reducescatter and reduce ----


def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> TensorHandle:
    """Start a `reducescatter`."""
    return _ops.reducescatter_async(
        tensor, _op_of(None, op), **_options(name, prescale_factor, postscale_factor, process_set)
    )


def reducescatter(
    tensor: Tensor,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Tensor:
    """Reduce a tensor over all ranks and leave each its rows; differentiable for Average and Sum."""
    options = autograd.ReduceOptions(
        _op_of(None, op), prescale_factor, postscale_factor, wire_of(compression), process_set
    )
    return compressed(compression, tensor, lambda sent: autograd.reducescatter(sent, options, name))


def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> TensorHandles:
    """Start a `reducescatter` of several tensors; `synchronize` returns the list of results."""
    return _ops.grouped_reducescatter_async(
        tensors, _op_of(None, op), **_options(name, prescale_factor, postscale_factor, process_set)
    )


def grouped_reducescatter(
    tensors: Sequence[Tensor],
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Tensor]:
    """Like `reducescatter`, for several tensors as one operation."""
    options = autograd.ReduceOptions(
        _op_of(None, op), prescale_factor, postscale_factor, wire_of(compression), process_set
    )
    return compressed_group(compression, tensors, lambda sent: autograd.grouped_reducescatter(sent, options, name))


def reduce_async(
    tensor: Tensor,
    root_rank: int,
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
) -> Handle[Tensor | None]:
    """Start a `reduce`."""
    return _ops.reduce_async(tensor, root_rank, _op_of(None, op), name=name, process_set=process_set)


def reduce(
    tensor: Tensor,
    root_rank: int,
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
) -> Tensor | None:
    """Reduce a tensor to one rank: a new tensor there, None elsewhere; not differentiable."""
    return _ops.reduce(tensor, root_rank, _op_of(None, op), name=name, process_set=process_set)


# ---- gathers, broadcast, exchanges ----


def allgather_async(
    tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> TensorHandle:
    """Start an `allgather`."""
    return _ops.allgather_async(tensor, name=name, process_set=process_set)


def allgather(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """Concatenate the tensors of all ranks along the first dimension, which may differ per rank; differentiable."""
    return autograd.allgather(tensor, process_set, name)


def grouped_allgather_async(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> TensorHandles:
    """Start an `allgather` of several tensors; `synchronize` returns the list of results."""
    return _ops.grouped_allgather_async(tensors, name=name, process_set=process_set)


def grouped_allgather(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Tensor]:
    """Like `allgather`, for several tensors as one operation."""
    return autograd.grouped_allgather(tensors, process_set, name)


def broadcast_async(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> TensorHandle:
    """Start a `broadcast` into a new tensor."""
    return _ops.broadcast_async(tensor, root_rank, name=name, process_set=process_set)


def broadcast_async_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> TensorHandle:
    """Start a `broadcast` in place on a contiguous tensor."""
    return _ops.broadcast_async_(tensor, root_rank, name=name, process_set=process_set)


def broadcast(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Return the root's tensor on every rank; differentiable. `root_rank` is numbered among all ranks."""
    return autograd.broadcast(tensor, root_rank, process_set, name)


def broadcast_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Like `broadcast`, in place on a contiguous tensor, which is returned."""
    return _ops.broadcast_(tensor, root_rank, name=name, process_set=process_set)


def alltoall_async(
    tensor: Tensor,
    splits: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle[Any]:
    """Start an `alltoall`, which documents `splits`; `synchronize` returns what that returns."""
    handle = _ops.alltoall_async(tensor, splits, name=name, process_set=process_set)
    return handle.map(lambda result: _alltoall_result(result, splits))


def alltoall(
    tensor: Tensor,
    splits: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send rows to every rank; differentiable.

    Args:
        splits: rows for each rank, a tensor or a sequence of integers that add up to the first dimension. None: equal
            parts.

    Returns:
        The received rows in rank order; with `splits` given, also a tensor of how many came from each rank.
    """
    result = autograd.alltoall(tensor, splits, process_set, name)
    return _alltoall_result(result, splits)


def _alltoall_result(result: tuple[Tensor, list[int]], splits: Any) -> Any:
    rows, received = result
    if splits is None:
        return rows
    dtype = splits.dtype if isinstance(splits, torch.Tensor) else torch.int32
    return rows, torch.tensor(received, dtype=dtype, device="cpu")


def gather_async(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle[Tensor | None]:
    """Start a `gather`."""
    return _ops.gather_async(tensor, root_rank, name=name, process_set=process_set)


def gather(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor | None:
    """Like `allgather` to one rank: a new tensor there, None elsewhere; not differentiable."""
    return _ops.gather(tensor, root_rank, name=name, process_set=process_set)


def scatter_async(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> TensorHandle:
    """Start a `scatter`."""
    return _ops.scatter_async(tensor, root_rank, name=name, process_set=process_set)


def scatter(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Deal out the rows of the root's tensor; elsewhere `tensor` gives dtype and trailing shape. No gradient."""
    return _ops.scatter(tensor, root_rank, name=name, process_set=process_set)


def send_async(
    tensor: Tensor, dest_rank: int, tag: int = 0, process_set: ProcessSet = global_process_set
) -> TensorHandle:
    """Start a `send`."""
    return _ops.send_async(tensor, dest_rank, tag=tag, process_set=process_set)


def send(tensor: Tensor, dest_rank: int, tag: int = 0, process_set: ProcessSet = global_process_set) -> None:
    """Send a tensor to one rank, which calls `recv` with one of the same shape and dtype."""
    _ops.send(tensor, dest_rank, tag=tag, process_set=process_set)


def recv_async(
    tensor: Tensor, source_rank: int, tag: int = 0, process_set: ProcessSet = global_process_set
) -> TensorHandle:
    """Start a `recv`."""
    return _ops.recv_async(tensor, source_rank, tag=tag, process_set=process_set)


def recv(tensor: Tensor, source_rank: int, tag: int = 0, process_set: ProcessSet = global_process_set) -> Tensor:
    """Receive into a contiguous tensor, which is returned."""
    return _ops.recv(tensor, source_rank, tag=tag, process_set=process_set)


# ---- the rest ----


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait until every rank of the set has called it."""
    _ops.barrier(process_set=process_set)


def join(device: int = -1, process_set: ProcessSet = global_process_set) -> int:
    """Say that this rank has run out of data; returns, once all ranks have, the one that joined last.

    `device` is Horovod's and not needed. `collective.join` says what the others' operations get in the meantime.
    """
    del device
    runtime.current()
    return _ops.join(process_set=process_set)


def poll(handle: Handle[Any] | Handles[Any]) -> bool:
    """Whether an asynchronous operation is finished, so that `synchronize` returns at once."""
    return handle.poll()


def synchronize(handle: Handle[Any] | Handles[Any] | Callable[[], Any]) -> Any:
    """Wait for an asynchronous operation and return its result; raises what went wrong."""
    if isinstance(handle, (Handle, Handles)):
        return handle.wait()
    if not callable(handle):
        raise InvalidArgumentError(f"synchronize takes the handle of an asynchronous operation, not {handle!r}")
    return handle()
