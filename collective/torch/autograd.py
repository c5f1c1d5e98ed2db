"""Gradients of the collectives: each is the adjoint of its operation, seen over all ranks.

| operation | gradient of the input |
|---|---|
| allreduce, Sum or Average | the same reduction of the output's gradients |
| reducescatter, Sum or Average | the gathered gradients, divided by the number of ranks for Average |
| allgather | this rank's rows of the sum |
| broadcast | the sum on the root, zero elsewhere |
| alltoall | the rows sent back |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import ops, runtime
from ..process_sets import ProcessSet
from ..submission import Average, Compression, Op, Sum

__all__ = ["ReduceOptions", "allgather", "allreduce", "alltoall", "broadcast", "reducescatter"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class ReduceOptions:
    """What a reduction and its gradient share."""

    op: Op
    prescale_factor: float
    postscale_factor: float
    compression: Compression | None
    process_set: ProcessSet

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of a reduction."""
        return dict(vars(self))

    def check_gradient(self, what: str) -> None:
        """Only linear reductions have one."""
        if self.op not in (Average, Sum):
            raise NotImplementedError(f"{what} with op {self.op.name} has no gradient")


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


class _Allreduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: ReduceOptions, name: str | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.options = options
        if len(tensors) == 1:
            return (ops.allreduce(tensors[0], name=name, **options.arguments()),)
        return tuple(ops.grouped_allreduce(tensors, name=name, **options.arguments()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.options.check_gradient("allreduce")
        return None, None, *allreduce(grads, ctx.options, None)  # differentiable in turn


def allreduce(tensors: Sequence[Tensor], options: ReduceOptions, name: str | None) -> list[Tensor]:
    """Differentiable all-reduce of several tensors."""
    return list(_apply(_Allreduce, options, name, *tensors))


class _Reducescatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: ReduceOptions, name: str | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.options = options
        if len(tensors) == 1:
            return (ops.reducescatter(tensors[0], name=name, **options.arguments()),)
        return tuple(ops.grouped_reducescatter(tensors, name=name, **options.arguments()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        options: ReduceOptions = ctx.options
        options.check_gradient("reducescatter")
        factor = options.prescale_factor * options.postscale_factor
        if options.op is Average:
            factor /= options.process_set.size()
        whole = allgather(grads, options.process_set, None)
        return None, None, *(grad * factor for grad in whole)


def reducescatter(tensors: Sequence[Tensor], options: ReduceOptions, name: str | None) -> list[Tensor]:
    """Differentiable reduce-scatter of several tensors."""
    return list(_apply(_Reducescatter, options, name, *tensors))


class _Allgather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, process_set: ProcessSet, name: str | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.process_set = process_set
        ctx.shapes = [tensor.shape for tensor in tensors]
        if len(tensors) == 1:
            return (ops.allgather(tensors[0], name=name, process_set=process_set),)
        return tuple(ops.grouped_allgather(tensors, name=name, process_set=process_set))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        process_set: ProcessSet = ctx.process_set
        totals = allreduce(grads, ReduceOptions(Sum, 1.0, 1.0, None, process_set), None)
        rows = [shape[0] if shape else 1 for shape in ctx.shapes]
        everyone = ops.allgather(torch.tensor([rows]), process_set=process_set)
        before = everyone[: process_set.rank()].sum(0).tolist()
        return (
            None,
            None,
            *(
                total.narrow(0, first, count).reshape(shape)
                for total, first, count, shape in zip(totals, before, rows, ctx.shapes, strict=True)
            ),
        )


def allgather(tensors: Sequence[Tensor], process_set: ProcessSet, name: str | None) -> list[Tensor]:
    """Differentiable all-gather of several tensors."""
    return list(_apply(_Allgather, process_set, name, *tensors))


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, root_rank: int, process_set: ProcessSet, name: str | None) -> Tensor:
        ctx.root_rank = root_rank
        ctx.process_set = process_set
        return ops.broadcast(tensor, root_rank, name=name, process_set=process_set)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (total,) = allreduce(grads, ReduceOptions(Sum, 1.0, 1.0, None, ctx.process_set), None)
        # Not zeros_like: where gradients of gradients are wanted, every rank takes part in them.
        is_root = torch.tensor(runtime.rank() == ctx.root_rank)
        return torch.where(is_root, total, torch.zeros_like(total)), None, None, None


def broadcast(tensor: Tensor, root_rank: int, process_set: ProcessSet, name: str | None) -> Tensor:
    """Differentiable broadcast."""
    result: Tensor = _apply(_Broadcast, tensor, root_rank, process_set, name)
    return result


class _Alltoall(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, splits: list[int] | None, process_set: ProcessSet, name: str | None
    ) -> tuple[Tensor, Tensor]:
        rows, received = ops.alltoall(tensor, splits, name=name, process_set=process_set)
        ctx.process_set = process_set
        ctx.received = received
        ctx.shape = tensor.shape
        counts = torch.tensor(received)
        ctx.mark_non_differentiable(counts)
        return rows, counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        back, _ = alltoall(grads[0], ctx.received, ctx.process_set, None)
        return back.reshape(ctx.shape), None, None, None


def alltoall(
    tensor: Tensor, splits: list[int] | None, process_set: ProcessSet, name: str | None
) -> tuple[Tensor, list[int]]:
    """Differentiable all-to-all: the received rows, and how many came from each rank."""
    rows, counts = _apply(_Alltoall, tensor, splits, process_set, name)
    return rows, counts.tolist()
