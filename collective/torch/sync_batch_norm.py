"""Batch normalisation over the batches of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .. import ops
from ..process_sets import ProcessSet, global_process_set
from ..submission import Sum

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.BatchNorm1d/2d/3d` whose statistics in training are those of the batches of all ranks together.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as for `torch.nn.BatchNorm2d`.
        process_set: the ranks whose batches count.

    Shape: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); N may differ between ranks and be zero on some. All ranks
    call forward and backward equally often and in the same order. In evaluation nothing is exchanged. Forward costs
    one all-reduce of 2 C + 1 numbers, backward one of 2 C.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_set: ProcessSet = global_process_set,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_set = process_set

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Normalise; in training by the statistics over all ranks."""
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average
                factor = 1.0 / float(self.num_batches_tracked)
        result, mean, var, count = _SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, self.eps, self.process_set
        )
        if self.training and self.running_mean is not None and self.running_var is not None:
            unbiased = var * (count / (count - 1).clamp(min=1))
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)
        return result  # type: ignore[no-any-return]


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, process_set: ProcessSet
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        over = [d for d in range(x.dim()) if d != 1]
        # Sums in double precision: a variance from sums of squares loses half the digits.
        wide = x.double()
        sums = torch.cat([wide.sum(over), (wide * wide).sum(over), wide.new_tensor([x.numel() / x.size(1)])])
        sums = ops.allreduce(sums, Sum, process_set=process_set)
        channels = x.size(1)
        count = sums[-1]
        mean = sums[:channels] / count
        var = (sums[channels : 2 * channels] / count - mean * mean).clamp(min=0)
        scale = torch.rsqrt(var + eps)
        shape = [1, channels] + [1] * (x.dim() - 2)
        normalised = ((wide - mean.view(shape)) * scale.view(shape)).to(x.dtype)
        ctx.save_for_backward(normalised, weight, scale, count)
        ctx.process_set = process_set
        result = normalised if weight is None else normalised * weight.view(shape).to(x.dtype)
        if bias is not None:
            result = result + bias.view(shape).to(x.dtype)
        ctx.mark_non_differentiable(mean, var, count)
        return result.clone() if weight is None and bias is None else result, mean, var, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        normalised, weight, scale, count = ctx.saved_tensors
        grad = grads[0]
        over = [d for d in range(grad.dim()) if d != 1]
        shape = [1, grad.size(1)] + [1] * (grad.dim() - 2)
        wide = grad.double()
        grad_sum = wide.sum(over)
        grad_dot = (wide * normalised.double()).sum(over)
        grad_x = None
        if ctx.needs_input_grad[0]:
            channels = grad.size(1)
            totals = ops.allreduce(torch.cat([grad_sum, grad_dot]), Sum, process_set=ctx.process_set) / count
            centred = wide - totals[:channels].view(shape) - normalised.double() * totals[channels:].view(shape)
            factor = scale if weight is None else scale * weight.double()
            grad_x = (centred * factor.view(shape)).to(grad.dtype)
        # The gradients of weight and bias stay local: the optimizer reduces them like all others.
        grad_weight = grad_dot.to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None
        grad_bias = grad_sum.to(grad.dtype if weight is None else weight.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None
