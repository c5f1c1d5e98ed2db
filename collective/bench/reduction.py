"""The reduction of gradients by way of DistributedOptimizer, apart from any training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import torch as hvd

__all__ = ["Reduction"]


class _NoUpdate(torch.optim.Optimizer):
    """Leaves parameters as they are."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do nothing: a DistributedOptimizer has reduced the gradients by now."""


class Reduction:
    """Parameters with gradients, and an optimizer that reduces them by Sum and does nothing else.

    It calls step(), since synchronize() reduces only once between two steps if no backward comes in between.

    Args:
        shapes: names and shapes of the parameters.
        as_view: gradients are views of buckets, reduced in place; else they are copied into buckets and back.
        dtype: of the parameters.
        process_set: the ranks that take part.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[str, tuple[int, ...]]],
        as_view: bool = False,
        dtype: torch.dtype = torch.float32,
        process_set: hvd.ProcessSet = hvd.global_process_set,
    ) -> None:
        self._parameters = [(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype))) for name, shape in shapes]
        for _, parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer = hvd.DistributedOptimizer(
            _NoUpdate([parameter for _, parameter in self._parameters]),
            named_parameters=self._parameters,
            op=hvd.Sum,
            gradient_as_bucket_view=as_view,
            process_set=process_set,
        )
        self._optimizer.step()  # agrees on buckets

    def arrays(self) -> list[Any]:
        """The gradients, each as one dimension."""
        return [parameter.grad.view(-1) for _, parameter in self._parameters if parameter.grad is not None]

    def run(self, count: int) -> None:
        """Reduce the gradients `count` times; collective."""
        for _ in range(count):
            self._optimizer.step()
