"""Gradients of the collectives, scaled as Horovod scales them; nowhere else is this decided.

Backward averages over the ranks where forward gathers or broadcasts, and multiplies by their number where forward
leaves each rank its part of a Sum. (The adjoints, seen over all ranks, would be the sum, and the parts themselves.) So
scripts that were tuned with Horovod train alike. What follows from it: where a loss is computed from gathered features,
the ranks' gradients of a weight add up to its gradient in one process; a DistributedOptimizer, which averages them, is
to be given op=Sum for that, or the loss a factor of size().

| operation | gradient of the input |
|---|---|
| allreduce, Average or Sum | the same reduction of the output's gradients |
| reducescatter, Average | the gathered gradients |
| reducescatter, Sum | the gathered gradients, times the number of ranks |
| allgather | this rank's rows of the average |
| broadcast | the average on the root, zero elsewhere |
| alltoall | the rows sent back |

Averages and numbers of ranks are those of the process set. Factors of a reduction multiply its gradient, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import ops, runtime
from ..process_sets import ProcessSet
from ..submission import Average, Compression, Sum, checked_op

__all__ = ["ReduceOptions", "allgather", "allreduce", "alltoall", "broadcast", "reducescatter"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class ReduceOptions:
    """What a reduction and its gradient share."""

    op: int
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
            raise NotImplementedError(f"{what} with op {checked_op(self.op).name} has no gradient")


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def _is_recorded(tensors: Sequence[Any]) -> bool:
    """Whether autograd needs to know."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


class _Allreduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: ReduceOptions, name: str | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.options = options
        return tuple(_allreduce(tensors, options, name))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.options.check_gradient("allreduce")
        return None, None, *allreduce(grads, ctx.options, None)  # differentiable in turn


def _allreduce(tensors: Sequence[Tensor], options: ReduceOptions, name: str | None) -> list[Tensor]:
    if len(tensors) == 1:
        return [ops.allreduce(tensors[0], name=name, **options.arguments())]
    return ops.grouped_allreduce(tensors, name=name, **options.arguments())


def allreduce(tensors: Sequence[Tensor], options: ReduceOptions, name: str | None) -> list[Tensor]:
    """Differentiable all-reduce of several tensors."""
    if not _is_recorded(tensors):
        return _allreduce(tensors, options, name)
    return list(_apply(_Allreduce, options, name, *tensors))


class _Reducescatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: ReduceOptions, name: str | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.options = options
        return tuple(_reducescatter(tensors, options, name))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        options: ReduceOptions = ctx.options
        options.check_gradient("reducescatter")
        factor = options.prescale_factor * options.postscale_factor
        if options.op == Sum:
            factor *= options.process_set.size()
        whole = allgather(grads, options.process_set, None)
        return None, None, *(grad * factor for grad in whole)


def _reducescatter(tensors: Sequence[Tensor], options: ReduceOptions, name: str | None) -> list[Tensor]:
    if len(tensors) == 1:
        return [ops.reducescatter(tensors[0], name=name, **options.arguments())]
    return ops.grouped_reducescatter(tensors, name=name, **options.arguments())


def reducescatter(tensors: Sequence[Tensor], options: ReduceOptions, name: str | None) -> list[Tensor]:
    """Differentiable reduce-scatter of several tensors."""
    if not _is_recorded(tensors):
        return _reducescatter(tensors, options, name)
    return list(_apply(_Reducescatter, options, name, *tensors))


class _Allgather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, process_set: ProcessSet, name: str | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.process_set = process_set
        ctx.shapes = [tensor.shape for tensor in tensors]
        return tuple(_allgather(tensors, process_set, name))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        process_set: ProcessSet = ctx.process_set
        means = allreduce(grads, ReduceOptions(Average, 1.0, 1.0, None, process_set), None)
        rows = [shape[0] if shape else 1 for shape in ctx.shapes]
        everyone = ops.allgather(np.array([rows]), process_set=process_set)
        before = everyone[: process_set.rank()].sum(0).tolist()
        return (
            None,
            None,
            *(
                mean.narrow(0, first, count).reshape(shape)
                for mean, first, count, shape in zip(means, before, rows, ctx.shapes, strict=True)
            ),
        )


def _allgather(tensors: Sequence[Tensor], process_set: ProcessSet, name: str | None) -> list[Tensor]:
    if len(tensors) == 1:
        return [ops.allgather(tensors[0], name=name, process_set=process_set)]
    return ops.grouped_allgather(tensors, name=name, process_set=process_set)


def allgather(tensors: Sequence[Tensor], process_set: ProcessSet, name: str | None) -> list[Tensor]:
    """Differentiable all-gather of several tensors."""
    if not _is_recorded(tensors):
        return _allgather(tensors, process_set, name)
    return list(_apply(_Allgather, process_set, name, *tensors))


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, root_rank: int, process_set: ProcessSet, name: str | None) -> Tensor:
        ctx.root_rank = root_rank
        ctx.process_set = process_set
        return ops.broadcast(tensor, root_rank, name=name, process_set=process_set)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (mean,) = allreduce(grads, ReduceOptions(Average, 1.0, 1.0, None, ctx.process_set), None)
        # Not zeros_like: where gradients of gradients are wanted, every rank takes part in them.
        is_root = torch.tensor(runtime.rank() == ctx.root_rank, device=mean.device)
        return torch.where(is_root, mean, torch.zeros_like(mean)), None, None, None


def broadcast(tensor: Tensor, root_rank: int, process_set: ProcessSet, name: str | None) -> Tensor:
    """Differentiable broadcast."""
    if not _is_recorded([tensor]):
        return ops.broadcast(tensor, root_rank, name=name, process_set=process_set)
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
        counts = torch.tensor(received, device="cpu")
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
    if not _is_recorded([tensor]):
        return ops.alltoall(tensor, splits, name=name, process_set=process_set)
    rows, counts = _apply(_Alltoall, tensor, splits, process_set, name)
    return rows, counts.tolist()
