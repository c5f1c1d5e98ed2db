"""What both reducers share: hooks on parameters, which ranks take part, and when there is something to reduce."""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from .. import ops, runtime
from ..process_sets import ProcessSet
from ..submission import Op
from .buckets import Named
from .profiling import ranged

__all__ = ["BaseReducer"]


class BaseReducer(ABC):
    """Reduces the gradients of a set of parameters over all ranks, in rounds from one `synchronize()` to the next.

    Args:
        label: returns the reducer's name in messages and in the agreement; the same on all ranks, distinct among
            reducers. To be called where all ranks call in one order: in `synchronize()`, not in a hook.
        parameters: returns the parameters as they are now, with their names.
        passes: how many backward passes make up a gradient.
        process_set: the ranks that take part.
        sparse_as_dense: turn sparse gradients into dense ones.
        sparse_again: and make them sparse again once they are reduced.
    """

    def __init__(
        self,
        label: Callable[[], str],
        parameters: Callable[[], list[Named]],
        passes: int,
        process_set: ProcessSet,
        sparse_as_dense: bool,
        sparse_again: bool,
    ) -> None:
        self.passes = passes
        self.enabled = True  # False: hooks do not count, see no_sync()
        self.synchronized = False  # synchronize() was called after the last step: the same on all ranks
        self._fresh = False  # this rank has got a gradient since
        self._label = label
        self._parameters = parameters
        self._process_set = process_set
        self._sparse_as_dense = sparse_as_dense
        self._sparse_again = sparse_again
        self._warnings: list[str] = []  # to be given when the round is complete on this rank: a warning may raise
        self._place = self._current_place()
        # The parameters, which outlive this reducer, hold no reference to it.
        self._hooks: dict[torch.Tensor, Any] = {}
        weakref.finalize(self, _remove, self._hooks)
        reducer = weakref.ref(self)

        def hook(parameter: torch.nn.Parameter) -> None:
            if (alive := reducer()) is not None:
                alive._fresh = True
                if runtime.is_initialized():  # else step() says so
                    alive._on_gradient(parameter)

        self._hook = hook

    @property
    def label(self) -> str:
        """The reducer's name."""
        return self._label()

    @property
    def _is_local(self) -> bool:
        """Whether gradients stay as they are: no other rank takes part, or this one does not."""
        return self._process_set.size() == 1 or not self._process_set.included()

    def _hook_up(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Register hooks on those that have none."""
        for p in parameters:
            if p not in self._hooks:
                self._hooks[p] = p.register_post_accumulate_grad_hook(self._hook)  # type: ignore[no-untyped-call]

    def _current_place(self) -> tuple[Any, int | None]:
        """The runtime and the registration of the process set that operations in flight belong to."""
        return runtime.current(), self._process_set.process_set_id

    def _on_any_rank(self, flags: Any) -> np.ndarray:
        """Which of these flags are set on any rank; collective."""
        own = np.asarray(flags, dtype=np.uint8)
        told: np.ndarray = ops.allreduce(own, Op.Max, name=f"{self.label}.flags", process_set=self._process_set)
        return told.astype(bool)

    @ranged(lambda self: f"synchronize {self.label}")
    def synchronize(self) -> None:
        """Wait until every gradient is reduced on every rank, and put the results into `.grad`; collective.

        Called again before the next step, it reduces again only if gradients have come to any rank.
        """
        if self._is_local:
            if self._sparse_as_dense and not self._sparse_again:
                for _, p in self._parameters():
                    if p.grad is not None and p.grad.is_sparse:
                        p.grad = p.grad.to_dense()
            return
        if self._is_outdated():
            self._forget()
        changed = self._is_changed()
        if self.synchronized and not self._on_any_rank(self._fresh or changed):
            return
        try:
            self._reduce(changed)
        finally:
            self._begin_round()
            self._fresh = False
        self.synchronized = True
        texts = self._warnings[:1]
        self._warnings.clear()
        for text in texts:
            warnings.warn(text, stacklevel=2)

    def _is_outdated(self) -> bool:
        """Whether what was agreed and started before belongs to something that has ended."""
        return self._place != self._current_place()

    def _forget(self) -> None:
        """Start afresh, when it is outdated."""
        if self._place != self._current_place():
            self.synchronized = False
        self._place = self._current_place()
        self._begin_round()

    def _is_changed(self) -> bool:
        """Whether the parameters are no longer those that the ranks have agreed on."""
        return False

    @abstractmethod
    def _on_gradient(self, parameter: torch.nn.Parameter) -> None:
        """A backward pass has added to the parameter's gradient."""

    @abstractmethod
    def _reduce(self, changed: bool) -> None:
        """End the round: every gradient is reduced on every rank."""

    @abstractmethod
    def _begin_round(self) -> None:
        """Discard what belongs to the last round."""


def _remove(hooks: dict[torch.Tensor, Any]) -> None:
    for hook in hooks.values():
        hook.remove()
