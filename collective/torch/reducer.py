"""Gradients into buckets, buckets to the engine, while backward is running.

The plan. Parameters are dealt to buckets in the order in which the first backward produced their gradients (the mean
over ranks). All ranks agree on order and layout once, when they are first needed; from then on a bucket runs without
any agreement.

Then the buckets run, round after round (rounds.py), and their results become the gradients (views.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import InvalidArgumentError
from ..process_sets import ProcessSet
from ..submission import Op
from .base_reducer import BaseReducer
from .buckets import Groups, Named, Slot, dense_strides
from .compression import Compressor
from .plan import Layout, open_plan
from .rounds import Rounds
from .sparse import SparseGradients

__all__ = ["GradientReducer"]


class GradientReducer(BaseReducer):
    """Averages (or sums) the gradients of a set of parameters over all ranks.

    Args:
        label: returns the reducer's name in messages and in the agreement; the same on all ranks, distinct among
            reducers.
        parameters: returns the parameters as they are now, with their names.
        compression: wire format of float32 and float64 gradients.
        op: Average or Sum.
        prescale, postscale: factors on gradients before and after the reduction.
        passes: how many backward passes make up a gradient.
        sparse_as_dense: turn sparse gradients into dense ones, rather than gather them.
        sparse_again: and make them sparse again once they are reduced.
        process_set: the ranks that take part.
        groups: the caller's choice of buckets: how many, or which parameters share one.
        as_view: True: gradients are views of buckets, and reduced in place; None: views while that goes unnoticed;
            False: results are always copied.
    """

    def __init__(
        self,
        label: Callable[[], str],
        parameters: Callable[[], list[Named]],
        *,
        compression: type[Compressor],
        op: Op,
        prescale: float,
        postscale: float,
        passes: int,
        sparse_as_dense: bool,
        sparse_again: bool,
        process_set: ProcessSet,
        groups: Groups,
        as_view: bool | None,
    ) -> None:
        super().__init__(label, parameters, passes, process_set, sparse_as_dense, sparse_again)
        self._layout = Layout(compression, op, prescale, postscale, process_set, groups, as_view is not False)
        self._as_view = as_view
        self._sparse = SparseGradients(label, self._layout, sparse_as_dense, sparse_again)
        self._joins = process_set.joins
        self._generation = 0  # of the plan, since then
        self._slots: dict[torch.nn.Parameter, Slot] = {}
        self._arrivals: dict[torch.nn.Parameter, None] = {}  # in this round, in order
        self._rounds: Rounds | None = None  # of the plan, once the ranks have agreed on it
        # The plan no longer fits the parameters: start nothing during backward. None: not checked yet.
        self._hold: bool | None = None
        if not self._is_local:
            self._take(parameters())

    # ---- the plan ----

    def _take(self, parameters: list[Named]) -> None:
        """From here on, these are the parameters. Local: the ranks agree in `_open()`."""
        self._rounds = None
        made_dense = {p for p, slot in self._slots.items() if slot.was_sparse}
        # Backward runs roughly in reverse.
        self._slots = {
            p: Slot(number, name, p, p.dtype, p.shape, dense_strides(p), p.device)
            for number, (name, p) in enumerate(reversed(parameters))
        }
        for p, slot in self._slots.items():
            slot.was_sparse = p in made_dense
        self._hook_up(self._slots)

    def _is_outdated(self) -> bool:
        """Also if ranks have joined since."""
        return super()._is_outdated() or self._joins != self._process_set.joins

    def _forget(self) -> None:
        """While a rank had joined, plans may have been opened that it knows nothing of, and buckets started here that
        its own script never starts: all ranks start afresh."""
        is_over = self._place != self._current_place()  # and so are its operations
        buckets = [] if is_over or self._rounds is None else self._rounds.plan.buckets
        runs = [bucket.run for bucket in buckets if bucket.run is not None]
        super()._forget()
        self._rounds = None
        for slot in self._slots.values():
            slot.bucket = slot.view = None
        self._joins = self._process_set.joins
        self._generation = 0
        for run in runs:  # in place, perhaps; the ranks that had joined have taken part
            run.wait()

    def _is_changed(self) -> bool:
        """Whether the parameters are no longer those of the plan."""
        parameters = self._parameters()
        return len(parameters) != len(self._slots) or any(
            slot.parameter is not p or slot.dtype != p.dtype or slot.shape != p.shape or slot.device != p.device
            for slot, (_, p) in zip(self._slots.values(), reversed(parameters), strict=True)
        )

    def _open(self) -> Rounds:
        """Agree on the plan with the other ranks; raises a MismatchError that names the first difference."""
        self._generation += 1  # even if this fails, so that all ranks count the same
        version = f"{self._joins}.{self._generation}"
        arrived = [self._slots[p] for p in self._arrivals if p in self._slots]
        plan = open_plan(self.label, version, list(self._slots.values()), arrived, self._layout)
        self._rounds = Rounds(self._label, plan, self._sparse, self._as_view, self._warnings)
        return self._rounds

    # ---- a round ----

    def _on_gradient(self, parameter: torch.nn.Parameter) -> None:
        if self._is_outdated():
            self._forget()
        slot = self._slots.get(parameter)
        if slot is None or not self.enabled:
            return
        slot.passes += 1
        slot.retired = None
        if slot.ready or slot.passes < self.passes:
            return  # one pass too many makes the bucket stale, see rounds.py
        slot.ready = True
        self._arrivals[parameter] = None
        bucket = slot.bucket
        if bucket is None or self._rounds is None:
            return  # nothing runs before the plan is agreed: backward must not wait for other ranks
        if slot.device.type == "cuda":
            bucket.streams.add(torch.cuda.current_stream(slot.device))
        bucket.waiting -= 1
        if bucket.waiting > 0 or bucket is self._rounds.plan.buckets[-1]:
            return
        if self._hold is None:
            # In-place buckets cannot be run again, so this must be known before the first one starts.
            self._hold = self._as_view is True and self._is_changed()
        if not self._hold:
            self._rounds.start(bucket)

    def _reduce(self, changed: bool) -> None:
        if self._rounds is None or not self._finish(self._rounds, changed):
            self._take(self._parameters())
            self._finish(self._open(), False)

    def _finish(self, rounds: Rounds, changed: bool) -> bool:
        """End the round, and fetch its results; False, with nothing fetched, if any rank has changed its plan."""
        if not rounds.plan.buckets:
            return not self._on_any_rank(changed).any()
        if not rounds.finish(changed):
            return False
        rounds.fetch()
        return True

    def _begin_round(self) -> None:
        if self._rounds is not None:
            self._rounds.begin()
        for slot in self._slots.values():
            slot.passes = 0
            slot.ready = slot.was_sparse = False
        self._arrivals = {}
        self._hold = None


def check_passes(passes: int) -> int:
    """A valid number of backward passes per step."""
    if not isinstance(passes, int) or passes < 1:
        raise InvalidArgumentError(f"backward_passes_per_step is a positive integer, not {passes!r}")
    return passes
