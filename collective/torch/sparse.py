"""Sparse gradients: gathered from all ranks outside their buckets; or dense on the way, and sparse again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .buckets import Slot
from .ops import sparse_allreduce_async
from .plan import Layout, Plan

__all__ = ["SparseGradients"]


@dataclass(frozen=True)
class SparseGradients:
    """How sparse gradients are reduced."""

    label: Callable[[], str]
    layout: Layout
    as_dense: bool  # rather than gathered
    again: bool  # sparse, once reduced as dense ones

    def is_gathered(self, plan: Plan, slot: Slot) -> bool:
        """Whether the gradient is reduced outside its bucket in this round, because it is sparse on some rank."""
        return not self.as_dense and plan.is_sparse(slot)

    def reduce(self, plan: Plan) -> None:
        """Gather the gradients that are sparse on any rank, which is collective; or make them sparse again."""
        if not self.as_dense:
            self._gather(plan)
        elif self.again:
            for slot in plan.slots:
                grad = slot.parameter.grad
                if grad is not None and plan.is_sparse(slot):
                    slot.parameter.grad = grad.to_sparse(1)

    def _gather(self, plan: Plan) -> None:
        sums = []
        layout = self.layout
        for slot in plan.slots:
            if not plan.is_sparse(slot):
                continue
            p = slot.parameter
            grad = p.grad
            if grad is None:
                grad = torch.sparse_coo_tensor(
                    torch.empty((1, 0), dtype=torch.int64, device=p.device),
                    torch.empty((0, *p.shape[1:]), dtype=p.dtype, device=p.device),
                    p.shape,
                    check_invariants=True,
                )
            elif not grad.is_sparse:
                grad = grad.to_sparse(1)
            name = f"{self.label()}.sparse.{slot.name}"
            scaled = grad * layout.prescale if layout.prescale != 1.0 else grad
            sums.append((p, sparse_allreduce_async(scaled, name, layout.op, layout.process_set)))
        for p, finish in sums:
            total = finish()
            p.grad = total * layout.postscale if layout.postscale != 1.0 else total
