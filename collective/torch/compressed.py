"""Gradients that a compressor of the user's own compresses: each travels by itself, under its name.

What the compressor makes of a gradient is known only once the gradient is there, so there is no plan of buckets to
agree on. A hook compresses the gradient and starts a named all-reduce, which overlaps with backward; the engine fuses
small ones.
`synchronize()` first exchanges three bits per parameter: whether any rank has a gradient, whether any rank's has
changed since it started, whether any is sparse. Ranks without a gradient send zeros, compressed; what has changed is
reduced again on all ranks.

The compressor is the user's code and may raise on one rank alone. If `compress` does, the others learn of it by a
refusal in place of the gradient; if `decompress` does, by a bit at the end. All ranks raise, and stay in step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import ops
from .._core import Kind
from ..errors import CollectiveError
from ..handles import Handle
from ..process_sets import ProcessSet
from ..submission import Call, Op
from .base_reducer import BaseReducer
from .buckets import Named

__all__ = ["CompressedReducer"]


@dataclass(eq=False)
class _Run:
    """An all-reduce that was started, of this gradient in this state."""

    handle: Handle[Any]
    context: Any
    grad: torch.Tensor | None
    version: int
    address: int

    def is_of(self, grad: torch.Tensor | None) -> bool:
        return grad is self.grad and (
            grad is None or (grad._version == self.version and grad.data_ptr() == self.address)
        )


class CompressedReducer(BaseReducer):
    """Averages (or sums) gradients between a compressor's two methods; arguments as for `GradientReducer`.

    Sparse gradients travel dense; with `sparse_again` they are made sparse again afterwards.
    """

    def __init__(
        self,
        label: Callable[[], str],
        parameters: Callable[[], list[Named]],
        *,
        compression: Any,
        op: Op,
        prescale: float,
        postscale: float,
        passes: int,
        sparse_as_dense: bool,
        sparse_again: bool,
        process_set: ProcessSet,
    ) -> None:
        super().__init__(label, parameters, passes, process_set, sparse_as_dense, sparse_again)
        self._compression = compression
        self._options: dict[str, Any] = {
            "op": op,
            "prescale_factor": prescale,
            "postscale_factor": postscale,
            "process_set": process_set,
        }
        self._names: dict[torch.Tensor, str] = {}
        self._counts: dict[torch.Tensor, int] = {}  # backward passes in this round
        self._runs: dict[torch.Tensor, _Run] = {}
        self._sparse: set[torch.Tensor] = set()  # whose gradients were sparse, in this round
        self._failure: Exception | None = None  # the compressor's, in this round
        self._take()

    def _take(self) -> list[torch.nn.Parameter]:
        """The parameters as they are now, all of them with a hook."""
        named = self._parameters()
        self._names.update((p, name) for name, p in named)
        self._hook_up(p for _, p in named)
        return [p for _, p in named]

    def _on_gradient(self, parameter: torch.nn.Parameter) -> None:
        if not self.enabled or self._is_local or self._is_outdated():
            return  # if it is outdated, synchronize() starts it
        self._counts[parameter] = self._counts.get(parameter, 0) + 1
        if self._counts[parameter] == self.passes:
            self._start(parameter)

    def _gradient(self, p: torch.Tensor) -> torch.Tensor | None:
        if p.grad is not None and p.grad.is_sparse:
            self._sparse.add(p)
            p.grad = p.grad.to_dense()
        return p.grad

    @torch.no_grad()
    def _start(self, p: torch.Tensor) -> None:
        grad = self._gradient(p)
        name = f"{self.label}.{self._names[p]}"
        context = None
        handle: Handle[Any]
        try:
            sent, context = self._compression.compress(torch.zeros_like(p) if grad is None else grad.detach())
        except Exception as error:
            self._failure = self._failure or error
            handle = Call(Kind.allreduce, name, self._process_set, False).refuse(error)
        else:
            handle = ops.allreduce_async(sent, name=name, **self._options)
        version, address = (0, 0) if grad is None else (grad._version, grad.data_ptr())
        self._runs[p] = _Run(handle, context, grad, version, address)

    @torch.no_grad()
    def _reduce(self, changed: bool) -> None:
        parameters = self._take()
        grads = [self._gradient(p) for p in parameters]
        is_here = [grad is not None for grad in grads]
        is_stale = [p in self._runs and not self._runs[p].is_of(g) for p, g in zip(parameters, grads, strict=True)]
        is_sparse = [p in self._sparse for p in parameters]
        told = self._on_any_rank([is_here, is_stale, is_sparse])
        for p, here, again in zip(parameters, told[0], told[1], strict=True):
            if (here or again) and p not in self._runs:
                self._start(p)  # what another rank has started must complete, even if no longer wanted
        errors: list[Exception] = []
        for p, here, again in zip(parameters, told[0], told[1], strict=True):
            if again and self._is_over(self._runs.pop(p), errors) and here:
                self._start(p)
        for p, sparse in zip(parameters, told[2], strict=True):
            run = self._runs.get(p)  # there is none without a gradient on any rank
            if run is not None and self._is_over(run, errors):
                try:
                    self._put(p, self._compression.decompress(run.handle.wait(), run.context), sparse)
                except Exception as error:
                    self._failure = self._failure or error
        # Errors of operations are the same on all ranks; the compressor's are not.
        if errors or self._on_any_rank(self._failure is not None):
            others = CollectiveError(f"{self.label}: the compressor of another rank has failed")
            raise self._failure or (errors or [others])[0]

    @staticmethod
    def _is_over(run: _Run, errors: list[Exception]) -> bool:
        """Wait for it, and return whether it has a result."""
        try:
            run.handle.wait()
        except CollectiveError as error:
            errors.append(error)
            return False
        return True

    def _put(self, p: torch.Tensor, result: torch.Tensor, sparse: bool) -> None:
        if p.grad is None:
            p.grad = result.to(p.dtype).reshape(p.shape)
        else:
            p.grad.copy_(result)
        if sparse and self._sparse_again:
            p.grad = p.grad.to_sparse(1)

    def _begin_round(self) -> None:
        self._counts.clear()
        self._runs.clear()
        self._sparse.clear()
        self._failure = None
