"""The delta optimizer: Adasum of the changes that each rank's own step made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import ops
from .._core import Kind
from ..handles import Handle
from ..process_sets import ProcessSet
from ..submission import Adasum, Call
from .compression import Compressor, is_custom, wire_of

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
        label: Callable[[], str],
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
        label = self._label()
        custom = is_custom(self._compression)
        errors: list[Exception] = []
        handles: list[tuple[Handle[Any], Any]] = []
        for number, (p, start) in enumerate(self._starts):
            name = f"{label}.delta.{self._names.get(p, number)}"
            delta, context = p.detach() - start, None
            try:
                if custom:
                    delta, context = self._compression.compress(delta)
            except Exception as error:  # the user's code: the other ranks must hear of it
                errors.append(error)
                handles.append((Call(Kind.allreduce, name, self._process_set, False).refuse(error), None))
                continue
            wire = wire_of(self._compression)
            handle = ops.allreduce_async(delta, Adasum, name=name, compression=wire, process_set=self._process_set)
            handles.append((handle, context))
        for (p, start), (handle, context) in zip(self._starts, handles, strict=True):
            try:  # all of them are waited for before an error is raised
                delta = handle.wait()
                p.copy_(start + (self._compression.decompress(delta, context) if custom else delta))
            except Exception as error:
                errors.append(error)
        self._starts = []
        if errors:
            raise errors[0]
