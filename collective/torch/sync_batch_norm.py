"""Batch normalisation over the batches of all ranks."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from .. import ops
from ..errors import InvalidArgumentError
from ..process_sets import ProcessSet, global_process_set
from ..submission import Sum

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.BatchNorm1d/2d/3d` whose statistics in training are those of the batches of all ranks together.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as for `torch.nn.BatchNorm2d`.
        process_set: the ranks whose batches count.

    Shape: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); N may differ between ranks and be zero on some. All ranks
    call forward and backward equally often and in the same order. Nothing is exchanged in evaluation. Forward costs
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

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_set: ProcessSet = global_process_set
    ) -> torch.nn.Module:
        """The module with every `torch.nn.BatchNorm1d/2d/3d` in it replaced by one of this class.

        Like `torch.nn.SyncBatchNorm.convert_sync_batchnorm`; torch's SyncBatchNorm is replaced, too. Parameters,
        buffers, hooks and other attributes stay, so an optimizer may have been made before; a module that occurs in
        several places stays one module. Subclasses with a `forward` of their own are left as they are, with a warning.
        Returns the module itself, unless it is one of those replaced.
        """
        return cls._convert(module, process_set, {})

    @classmethod
    def _convert(
        cls, module: torch.nn.Module, process_set: ProcessSet, done: dict[torch.nn.Module, torch.nn.Module]
    ) -> torch.nn.Module:
        if module in done:
            return done[module]
        done[module] = module
        if isinstance(module, _BatchNorm) and not isinstance(module, cls):
            if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
                raise InvalidArgumentError(
                    f"a {type(module).__qualname__} does not know its number of features yet: run the model once first"
                )
            is_parametrized = torch.nn.utils.parametrize.is_parametrized(module)
            if is_parametrized or type(module).forward not in (_BatchNorm.forward, torch.nn.SyncBatchNorm.forward):
                has = "parametrized tensors" if is_parametrized else "a forward() of its own"
                warnings.warn(
                    f"{type(module).__qualname__} has {has}, and keeps the statistics of each rank", stacklevel=3
                )
                return module
            new = cls.__new__(cls)
            for name, value in vars(module).items():  # those that register parameters, buffers and hooks are dicts
                vars(new)[name] = value.copy() if isinstance(value, dict) else value
            new.process_set = process_set
            done[module] = new
            return new
        for name, child in module._modules.items():
            if child is not None:
                setattr(module, name, cls._convert(child, process_set, done))
        return module

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Normalise; in training, by the statistics over all ranks."""
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
            factors = (factor * (count > 0)).to(self.running_mean.dtype)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), factors)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), factors)
        return result  # type: ignore[no-any-return]


class _SyncBatchNorm(torch.autograd.Function):
    """Elements are float32 here (float64 if the input is), statistics of a channel float64."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, process_set: ProcessSet
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.size(1)
        over, shape = _dimensions(x)
        wide = _wide_type(x)
        size = x.numel() // max(channels, 1)
        mean = x.sum(over, dtype=wide) / max(size, 1)
        # The squares are summed around this rank's mean: around zero they would lose half the digits.
        squares = (x - mean.view(shape)).square_().sum(over).double()
        mean = mean.double()
        sums = torch.cat([size * mean, squares + size * mean * mean, mean.new_tensor([size])])
        sums = ops.allreduce(sums, Sum, process_set=process_set)
        count = sums[-1]
        most = count.clamp(min=1)  # nothing on any rank: zeros, not NaN
        mean = sums[:channels] / most
        var = (sums[channels : 2 * channels] / most - mean * mean).clamp(min=0)
        result = torch.nn.functional.batch_norm(
            x,
            mean.to(wide),
            var.to(wide),
            None if weight is None else weight.to(wide),
            None if bias is None else bias.to(wide),
            training=False,
            eps=eps,
        )
        ctx.save_for_backward(x, weight, bias, mean, torch.rsqrt(var + eps), count)
        ctx.process_set = process_set
        ctx.mark_non_differentiable(mean, var, count)
        return result, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, mean, scale, count = ctx.saved_tensors
        channels = x.size(1)
        over, shape = _dimensions(x)
        wide = _wide_type(x)
        grad, centred = grads[0], x - mean.to(wide).view(shape)
        grad_sum = grad.sum(over, dtype=wide).double()
        grad_dot = (grad * centred).sum(over).double() * scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            # (grad - average(grad) - normalised * average(grad * normalised)) * scale * weight
            totals = ops.allreduce(torch.cat([grad_sum, grad_dot]), Sum, process_set=ctx.process_set)
            totals = totals / count.clamp(min=1)
            factor = scale if weight is None else scale * weight.double()
            slope = -totals[channels:] * scale * factor
            offset = -totals[:channels] * factor
            factor, slope, offset = (v.to(wide).view(shape) for v in (factor, slope, offset))
            grad_x = centred.mul_(slope).add_(offset).add_(grad * factor).to(x.dtype)
        # The gradients of weight and bias stay local: the optimizer reduces them like all others.
        grad_weight = grad_dot.to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = grad_sum.to(bias.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None


def _dimensions(x: Tensor) -> tuple[list[int], list[int]]:
    """All dimensions but the channels', and the shape in which one number per channel broadcasts to x."""
    return [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)


def _wide_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
