"""The collective operations on tensors, with Horovod's names and argument order.

The forms that return a new tensor are differentiable. Sources of the gradients: the adjoint of the operation, as in
Horovod: that of a sum over ranks is a sum over ranks, that of a gather is this rank's part of the sum, that of a
broadcast is the sum on the root and zero elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import ops as _ops
from .. import runtime
from ..errors import InvalidArgumentError
from ..handles import Handle
from ..ops import Average, Op, Sum
from .compression import Compression, Compressor

__all__ = [
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
    "poll",
    "synchronize",
]

TensorHandle = Handle[torch.Tensor]


def _op_of(average: bool | None, op: int | None) -> Op:
    """Horovod's `average=` argument is older than `op=`; at most one of them may be given."""
    if average is not None and op is not None:
        raise InvalidArgumentError("average= and op= were both given; op= alone says it all")
    if op is not None:
        return _ops.checked_op(op)
    return Average if average is None or average else Sum


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> TensorHandle:
    """Start an `allreduce` of a copy; returns a handle for `synchronize`. Not differentiable."""
    return _ops.allreduce_async(
        tensor.detach(),
        _op_of(average, op),
        name=name,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
    )


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> TensorHandle:
    """Start an `allreduce_` in place; returns a handle for `synchronize`."""
    return _ops.allreduce_async_(
        tensor, _op_of(average, op), name=name, prescale_factor=prescale_factor, postscale_factor=postscale_factor
    )


class _Allreduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        op: Op,
        name: str | None,
        prescale_factor: float,
        postscale_factor: float,
        wire: _ops.Compression | None,
    ) -> torch.Tensor:
        ctx.arguments = (op, prescale_factor, postscale_factor, wire)
        return _ops.allreduce(
            tensor,
            op,
            name=name,
            prescale_factor=prescale_factor,
            postscale_factor=postscale_factor,
            compression=wire,
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        op, prescale_factor, postscale_factor, wire = ctx.arguments
        if op not in (Average, Sum):
            raise NotImplementedError(f"allreduce with op {op.name} has no gradient")
        grad = _ops.allreduce(
            grads[0], op, prescale_factor=prescale_factor, postscale_factor=postscale_factor, compression=wire
        )
        return grad, None, None, None, None, None


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """Reduce a tensor over all ranks (by Average unless `op` says otherwise); differentiable for Average and Sum.

    Shape, dtype and arguments are the same on all ranks; see `collective.allreduce` for the rest.
    """
    op_ = _op_of(average, op)
    result: torch.Tensor = _Allreduce.apply(tensor, op_, name, prescale_factor, postscale_factor, compression.wire)  # type: ignore[no-untyped-call]
    return result


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """Like `allreduce`, in place on a contiguous tensor, which is returned; not differentiable."""
    return allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor).wait()


def allgather_async(tensor: torch.Tensor, name: str | None = None) -> TensorHandle:
    """Start an `allgather`; returns a handle for `synchronize`. Not differentiable."""
    return _ops.allgather_async(tensor.detach(), name=name)


class _Allgather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, name: str | None) -> torch.Tensor:
        ctx.shape = tensor.shape
        return _ops.allgather(tensor, name=name)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        rows = ctx.shape[0] if ctx.shape else 1
        total = _ops.allreduce(grads[0], Sum)
        before = int(_ops.allgather(torch.tensor([rows]))[: runtime.rank()].sum())
        return total.narrow(0, before, rows).reshape(ctx.shape), None


def allgather(tensor: torch.Tensor, name: str | None = None) -> torch.Tensor:
    """Concatenate the tensors of all ranks along the first dimension, which may differ per rank; differentiable."""
    result: torch.Tensor = _Allgather.apply(tensor, name)  # type: ignore[no-untyped-call]
    return result


def broadcast_async(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> TensorHandle:
    """Start a `broadcast`; returns a handle for `synchronize`. Not differentiable."""
    return _ops.broadcast_async(tensor.detach(), root_rank, name=name)


def broadcast_async_(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> TensorHandle:
    """Start a `broadcast_` in place; returns a handle for `synchronize`."""
    return _ops.broadcast_async_(tensor, root_rank, name=name)


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, root_rank: int, name: str | None) -> torch.Tensor:
        ctx.root_rank = root_rank
        return _ops.broadcast(tensor, root_rank, name=name)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        total = _ops.allreduce(grads[0], Sum)
        return (total if runtime.rank() == ctx.root_rank else torch.zeros_like(total)), None, None


def broadcast(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """Return the root's tensor on every rank; differentiable."""
    result: torch.Tensor = _Broadcast.apply(tensor, root_rank, name)  # type: ignore[no-untyped-call]
    return result


def broadcast_(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """Like `broadcast`, in place on a contiguous tensor, which is returned; not differentiable."""
    return _ops.broadcast_(tensor, root_rank, name=name)


def barrier() -> None:
    """Wait until every rank has called it."""
    _ops.barrier()


def poll(handle: Handle[Any]) -> bool:
    """Whether an asynchronous operation is finished, so that `synchronize` returns at once."""
    return handle.poll()


def synchronize(handle: Handle[Any] | Callable[[], Any]) -> Any:
    """Wait for an asynchronous operation and return its result; raises what went wrong."""
    return handle.wait() if isinstance(handle, Handle) else handle()
