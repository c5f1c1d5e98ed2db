"""Gradients of the collectives, scaled as Horovod scales them; this is decided nowhere else.

Backward averages over the ranks where forward gathers or broadcasts, and multiplies by their number where forward
leaves each rank its part of a Sum. (The adjoints over all ranks would be the sum, and the parts themselves.) So scripts
that were tuned with Horovod train the same way. A consequence: where a loss is computed from gathered features, the
ranks' gradients of a weight add up to its gradient in one process; a DistributedOptimizer, which averages them, needs
op=Sum for that, or the loss a factor of size().

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import ops, runtime
from ..process_sets import ProcessSet
from ..submission import Average, Compression, Sum, checked_op

__all__ = [
    "ReduceOptions",
    "allgather",
    "allreduce",
    "alltoall",
    "broadcast",
    "grouped_allgather",
    "grouped_allreduce",
    "grouped_reducescatter",
    "reducescatter",
]

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
        """Raise unless the reduction is linear: only those have a gradient."""
        if self.op not in (Average, Sum):
            raise NotImplementedError(f"{what} with op {checked_op(self.op).name} has no gradient")

    def factor_of_gathered(self, what: str) -> float:
        """The factor on the gathered gradients of a reduce-scatter."""
        self.check_gradient(what)
        factor = self.prescale_factor * self.postscale_factor
        return factor * self.process_set.size() if self.op == Sum else factor


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def _is_recorded(*tensors: Any) -> bool:
    """Whether autograd must record an operation on these."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


class _Operation(torch.autograd.Function):
    """An operation on one tensor, or on several as a tuple, whose gradient is such an operation on the gradients.

    `gradient` holds on to no tensors: the graph keeps it until backward.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], gradient: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.gradient = gradient
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        result = ctx.gradient(*grads)  # differentiable in turn
        return (None, None, *result) if isinstance(result, tuple) else (None, None, result)


def _differentiable(run: Callable[..., Any], gradient: Callable[..., Any], *tensors: Any) -> Any:
    return _apply(_Operation, run, gradient, *tensors) if _is_recorded(*tensors) else run(*tensors)


def allreduce(tensor: Tensor, options: ReduceOptions, name: str | None) -> Tensor:
    """Differentiable all-reduce."""

    def gradient(grad: Tensor) -> Tensor:
        options.check_gradient("allreduce")
        return allreduce(grad, options, None)

    result: Tensor = _differentiable(lambda x: ops.allreduce(x, name=name, **options.arguments()), gradient, tensor)
    return result


def grouped_allreduce(tensors: Sequence[Tensor], options: ReduceOptions, name: str | None) -> list[Tensor]:
    """Differentiable all-reduce of several tensors."""

    def run(*xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.grouped_allreduce(xs, name=name, **options.arguments()))

    def gradient(*grads: Tensor) -> tuple[Tensor, ...]:
        options.check_gradient("allreduce")
        return tuple(grouped_allreduce(grads, options, None))

    return list(_differentiable(run, gradient, *tensors))


def reducescatter(tensor: Tensor, options: ReduceOptions, name: str | None) -> Tensor:
    """Differentiable reduce-scatter."""

    def gradient(grad: Tensor) -> Tensor:
        factor = options.factor_of_gathered("reducescatter")
        return allgather(grad, options.process_set, None) * factor

    result: Tensor = _differentiable(lambda x: ops.reducescatter(x, name=name, **options.arguments()), gradient, tensor)
    return result


def grouped_reducescatter(tensors: Sequence[Tensor], options: ReduceOptions, name: str | None) -> list[Tensor]:
    """Differentiable reduce-scatter of several tensors."""

    def run(*xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.grouped_reducescatter(xs, name=name, **options.arguments()))

    def gradient(*grads: Tensor) -> tuple[Tensor, ...]:
        factor = options.factor_of_gathered("reducescatter")
        return tuple(whole * factor for whole in grouped_allgather(grads, options.process_set, None))

    return list(_differentiable(run, gradient, *tensors))


def _average(process_set: ProcessSet) -> ReduceOptions:
    return ReduceOptions(Average, 1.0, 1.0, None, process_set)


def _rows(shape: Sequence[int]) -> int:
    return shape[0] if shape else 1


def _rows_before(rows: Any, process_set: ProcessSet) -> Any:
    """How many rows the ranks before this one have, for each tensor if `rows` is a list; collective."""
    return ops.allgather(np.array([rows]), process_set=process_set)[: process_set.rank()].sum(0).tolist()


def allgather(tensor: Tensor, process_set: ProcessSet, name: str | None) -> Tensor:
    """Differentiable all-gather."""
    shape = getattr(tensor, "shape", ())

    def gradient(grad: Tensor) -> Tensor:
        mean = allreduce(grad, _average(process_set), None)
        return mean.narrow(0, _rows_before(_rows(shape), process_set), _rows(shape)).reshape(shape)

    result: Tensor = _differentiable(lambda x: ops.allgather(x, name=name, process_set=process_set), gradient, tensor)
    return result


def grouped_allgather(tensors: Sequence[Tensor], process_set: ProcessSet, name: str | None) -> list[Tensor]:
    """Differentiable all-gather of several tensors."""
    shapes = [getattr(tensor, "shape", ()) for tensor in tensors]

    def run(*xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.grouped_allgather(xs, name=name, process_set=process_set))

    def gradient(*grads: Tensor) -> tuple[Tensor, ...]:
        means = grouped_allreduce(grads, _average(process_set), None)
        before = _rows_before([_rows(shape) for shape in shapes], process_set)
        return tuple(
            mean.narrow(0, first, _rows(shape)).reshape(shape)
            for mean, first, shape in zip(means, before, shapes, strict=True)
        )

    return list(_differentiable(run, gradient, *tensors))


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, root_rank: int, process_set: ProcessSet, name: str | None) -> Tensor:
        ctx.root_rank = root_rank
        ctx.process_set = process_set
        return ops.broadcast(tensor, root_rank, name=name, process_set=process_set)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        mean = allreduce(grads[0], _average(ctx.process_set), None)
        # Not zeros_like alone: if gradients of gradients are wanted, every rank takes part in them.
        is_root = torch.tensor(runtime.rank() == ctx.root_rank, device=mean.device)
        return torch.where(is_root, mean, torch.zeros_like(mean)), None, None, None


def broadcast(tensor: Tensor, root_rank: int, process_set: ProcessSet, name: str | None) -> Tensor:
    """Differentiable broadcast."""
    if not _is_recorded(tensor):
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
    if not _is_recorded(tensor):
        return ops.alltoall(tensor, splits, name=name, process_set=process_set)
    rows, counts = _apply(_Alltoall, tensor, splits, process_set, name)
    return rows, counts.tolist()
