"""Gradients that a compressor of the user's own makes smaller: each travels by itself, under its name.

What the compressor makes of a gradient is known only once it is there, so there is no plan of buckets to agree on. A
hook compresses the gradient and starts a named all-reduce, which overlaps with backward; the engine fuses small ones.
`synchronize()` first exchanges three bits per parameter: whether any rank has a gradient, whether any rank's has
changed since it started, whether any is sparse. Ranks without a gradient send zeros, compressed; what has changed is
reduced again on all ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import ops, runtime
from ..handles import Handle
from ..process_sets import ProcessSet
from ..submission import Op
from .buckets import Named

__all__ = ["CompressedReducer"]


@dataclass(eq=False)
class _Run:
    """An all-reduce that was started, of this gradient in this state."""

    handle: Handle[torch.Tensor]
    context: Any
    grad: torch.Tensor | None
    version: int
    address: int

    def is_of(self, grad: torch.Tensor | None) -> bool:
        return grad is self.grad and (
            grad is None or (grad._version == self.version and grad.data_ptr() == self.address)
        )


class CompressedReducer:
    """Averages (or sums) gradients between a compressor's two methods; arguments as for `GradientReducer`.

    Sparse gradients travel dense; `sparse_again`: and are sparse again afterwards.
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
        sparse_again: bool,
        process_set: ProcessSet,
    ) -> None:
        self.passes = passes
        self.enabled = True
        self.synchronized = False
        self._fresh = False
        self._label = label
        self._parameters = parameters
        self._compression = compression
        self._sparse_again = sparse_again
        self._options: dict[str, Any] = {
            "op": op,
            "prescale_factor": prescale,
            "postscale_factor": postscale,
            "process_set": process_set,
        }
        self._process_set = process_set
        self._state = runtime.current()
        self._names: dict[torch.Tensor, str] = {}
        self._counts: dict[torch.Tensor, int] = {}  # backward passes in this round
        self._runs: dict[torch.Tensor, _Run] = {}
        self._sparse: set[torch.Tensor] = set()  # whose gradient was, in this round
        self._hooks: dict[torch.Tensor, Any] = {}
        weakref.finalize(self, _remove, self._hooks)
        reducer = weakref.ref(self)

        def hook(parameter: torch.nn.Parameter) -> None:
            if (alive := reducer()) is not None:
                alive._on_gradient(parameter)

        self._hook = hook
        self._take()

    @property
    def _is_local(self) -> bool:
        return self._process_set.size() == 1 or not self._process_set.included()

    def _take(self) -> list[Named]:
        """The parameters as they are now, all of them with a hook."""
        parameters = self._parameters()
        for name, p in parameters:
            self._names[p] = name
            if p not in self._hooks:
                self._hooks[p] = p.register_post_accumulate_grad_hook(self._hook)  # type: ignore[no-untyped-call]
        return parameters

    def _on_gradient(self, parameter: torch.nn.Parameter) -> None:
        self._fresh = True
        if not self.enabled or not runtime.is_initialized() or self._is_local:
            return
        self._forget_another_run()
        self._counts[parameter] = self._counts.get(parameter, 0) + 1
        if self._counts[parameter] == self.passes:
            self._start(parameter)

    def _forget_another_run(self) -> None:
        """Of the runtime: init() was called again."""
        if self._state is not runtime.current():
            self._state = runtime.current()
            self.synchronized = False
            self._begin_round()

    def _gradient(self, p: torch.Tensor) -> torch.Tensor | None:
        if p.grad is not None and p.grad.is_sparse:
            self._sparse.add(p)
            p.grad = p.grad.to_dense()
        return p.grad

    @torch.no_grad()
    def _start(self, p: torch.Tensor) -> None:
        grad = self._gradient(p)
        sent, context = self._compression.compress(torch.zeros_like(p) if grad is None else grad.detach())
        handle = ops.allreduce_async(sent, name=f"{self._label()}.{self._names[p]}", **self._options)
        version, address = (0, 0) if grad is None else (grad._version, grad.data_ptr())
        self._runs[p] = _Run(handle, context, grad, version, address)

    def synchronize(self) -> None:
        """Wait until every gradient is reduced on every rank, and put the results into `.grad`; collective."""
        if self._is_local:
            return
        self._forget_another_run()
        if self.synchronized and not self._on_any_rank(np.array([self._fresh])).any():
            return
        try:
            self._reduce([p for _, p in self._take()])
        finally:
            self._begin_round()
            self._fresh = False
        self.synchronized = True

    @torch.no_grad()
    def _reduce(self, parameters: list[torch.nn.Parameter]) -> None:
        grads = [self._gradient(p) for p in parameters]
        is_stale = [p in self._runs and not self._runs[p].is_of(g) for p, g in zip(parameters, grads, strict=True)]
        was_sparse = [p in self._sparse for p in parameters]
        told = self._on_any_rank(np.array([[g is not None for g in grads], is_stale, was_sparse], dtype=bool))
        for p, is_here, again in zip(parameters, told[0], told[1], strict=True):
            if (is_here or again) and p not in self._runs:
                self._start(p)  # what another rank has started must end, also where it is not wanted any more
        for p, is_here, again in zip(parameters, told[0], told[1], strict=True):
            if again:
                self._runs.pop(p).handle.wait()
                if is_here:
                    self._start(p)
        for p, is_sparse in zip(parameters, told[2], strict=True):
            run = self._runs.get(p)
            if run is None:
                continue  # without a gradient on any rank
            result = self._compression.decompress(run.handle.wait(), run.context)
            if p.grad is None:
                p.grad = result.to(p.dtype).reshape(p.shape)
            else:
                p.grad.copy_(result)
            if is_sparse and self._sparse_again:
                p.grad = p.grad.to_sparse(1)

    def _on_any_rank(self, flags: np.ndarray) -> np.ndarray:
        told: np.ndarray = ops.allreduce(
            flags.astype(np.uint8), Op.Max, name=f"{self._label()}.told", process_set=self._process_set
        )
        return told

    def _begin_round(self) -> None:
        self._counts.clear()
        self._runs.clear()
        self._sparse.clear()


def _remove(hooks: dict[torch.Tensor, Any]) -> None:
    for hook in hooks.values():
        hook.remove()
