"""The delta optimizer: Adasum of what each rank's own step changed."""

from __future__ import annotations

import torch

from .. import ops
from ..process_sets import ProcessSet
from ..submission import Adasum
from .compression import Compressor

__all__ = ["AdasumStep"]


class AdasumStep:
    """Around an optimizer's step: remembers the parameters, then combines the ranks' changes to them.

    start = p;  step();  p = start + adasum over ranks of (p - start)

    Source: arXiv 2006.02924, section 4, as in Horovod's delta optimizer.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: dict[torch.Tensor, str],
        label: str,
        compression: type[Compressor],
        process_set: ProcessSet,
    ) -> None:
        self._optimizer = optimizer
        self._names = names
        self._label = label
        self._compression = compression
        self._process_set = process_set
        self._starts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before(self) -> None:
        """Remember where the parameters are."""
        self._starts = [
            (p, p.detach().clone())
            for group in self._optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        ]

    @torch.no_grad()
    def after(self) -> None:
        """Combine the changes; collective."""
        handles = []
        for number, (p, start) in enumerate(self._starts):
            name = f"{self._label}.delta.{self._names.get(p, number)}"
            handles.append(
                ops.allreduce_async(
                    p.detach() - start,
                    Adasum,
                    name=name,
                    compression=self._compression.wire,
                    process_set=self._process_set,
                )
            )
        for (p, start), handle in zip(self._starts, handles, strict=True):
            p.copy_(start + handle.wait())
        self._starts = []
