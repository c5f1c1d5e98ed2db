"""Rounds of a plan: the buckets run, and run again if gradients have changed.

From one `synchronize()` to the next every bucket runs exactly once, plus the reruns below, on every rank:

1. A hook counts each gradient once it is accumulated; the last gradient of a bucket starts the bucket.
2. `synchronize()` starts the buckets that are still waiting: a parameter without a gradient here contributes zeros.
   The last bucket, which holds the first layers and whose gradients come last anyway, always starts here. It carries
   notes: which buckets are stale, that is, whose gradients have changed since they started (a second backward, an
   unscale or a clip before synchronize, zero_grad); and which gradients are sparse.
3. A bucket that is stale on any rank runs again on all. So ranks stay in step whatever each of them did, and no
   gradient is ever half of one backward and half of another.
4. `.grad` becomes a view of its place in the bucket, where the result lies; or the result is copied into it. Until
   then the engine only reads gradients, except those that are such views already. A parameter without a gradient on
   some ranks gets one; without a gradient on any rank it keeps None. A gradient that is sparse on any rank is gathered
   from all, outside its bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .. import arrays, runtime
from ..errors import CollectiveError, GradientChangedError, UnsupportedTypeError
from ..handles import Handle
from .buckets import Bucket, Slot
from .plan import Plan
from .profiling import ranged
from .sparse import SparseGradients
from .views import fetch, leave_to_others

__all__ = ["Rounds"]


class Rounds:
    """Runs the buckets of a plan, round after round.

    Args:
        label: returns the reducer's name in messages.
        plan: what the ranks have agreed on.
        sparse: how sparse gradients are reduced.
        as_view: as for `GradientReducer`.
        warnings: collects the texts of warnings to be given when the round is complete.
    """

    def __init__(
        self,
        label: Callable[[], str],
        plan: Plan,
        sparse: SparseGradients,
        as_view: bool | None,
        warnings: list[str],
    ) -> None:
        self.plan = plan
        self._label = label
        self._sparse = sparse
        self._as_view = as_view
        self._warnings = warnings
        self._refused: list[str] = []  # which gradients cannot travel, and why

    def begin(self) -> None:
        """Forget the runs of the previous round."""
        for bucket in self.plan.buckets:
            bucket.run = None
            bucket.given = []
            bucket.waiting = len(bucket.slots)

    @ranged(lambda self, bucket, notes=(): f"start bucket {self.plan.buckets.index(bucket)}")
    def start(self, bucket: Bucket, notes: Sequence[int] = ()) -> None:
        """Start a bucket on the gradients as they are now; notes are for the last one."""
        for stream in bucket.streams:  # the engine looks only at the current one
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        bucket.streams.clear()
        pointers = []
        keep = []
        given: list[tuple[torch.Tensor | None, int, int]] = []
        for number, slot in enumerate(bucket.slots):
            grad = self._gradient(slot)
            if not self._as_view:
                grad = leave_to_others(self._label, bucket, number, grad, self._warnings)
            if grad is None:
                given.append((None, 0, 0))
                pointers.append(0)
                continue
            given.append((grad, grad._version, grad.data_ptr()))
            if grad.stride() != slot.strides or grad.dtype != bucket.dtype:
                grad = torch.empty_strided(grad.shape, slot.strides, dtype=bucket.dtype, device=grad.device).copy_(
                    grad.detach()
                )
            keep.append(grad)
            pointers.append(grad.data_ptr())
        ticket = bucket.core.start(pointers, list(notes), *arrays.place_of_tensor(bucket.slots[0].parameter))
        bucket.given = given
        bucket.run = Handle(runtime.current().engine, ticket, keep, lambda _: None)

    def finish(self, changed: bool) -> bool:
        """Run every bucket to its end on the gradients as they are now; False if any rank has changed its plan.

        Collective. Raises UnsupportedTypeError and GradientChangedError, on all ranks.
        """
        plan = self.plan
        self._refused = []
        last = plan.buckets[-1]
        told = plan.notes
        started = [n for n, bucket in enumerate(plan.buckets) if bucket.run is not None]
        notes = [told.stale[n] for n in started if self._is_stale(plan.buckets[n])]
        if changed:
            notes.append(told.changed)
            for slot in plan.slots:  # out of the way of buckets about to run for the last time
                grad = slot.parameter.grad
                if grad is None or not slot.holds(grad):
                    continue
                assert slot.bucket is not None
                if slot.bucket.run is not None:
                    notes.append(told.spoiled)
                slot.take_out()
        for bucket in plan.buckets[:-1]:
            if bucket.run is None:
                self.start(bucket)
        for slot in last.slots:
            self._gradient(slot)  # may refuse it
        for slot in plan.slots:
            grad = slot.parameter.grad
            if grad is None:
                continue
            if self._as_view and slot.holds(grad):
                notes.append(told.in_place[slot.number])
            elif slot.was_sparse or (grad.is_sparse and not self._sparse.as_dense):
                notes.append(told.sparse[slot.number])
        if self._refused:
            notes.append(told.refused)
        self.start(last, notes)
        assert last.run is not None
        last.run.wait()
        spoiled = []
        if not plan.is_noted(told.changed):
            for number, bucket in enumerate(plan.buckets[:-1]):
                assert bucket.run is not None
                if not plan.is_noted(told.stale[number]):
                    continue
                bucket.run.wait()
                gone = [slot for slot in bucket.slots if plan.is_noted(told.in_place[slot.number])]
                spoiled += gone
                if not gone:
                    self.start(bucket)
            spoiled += [
                slot
                for slot in plan.slots
                if self._sparse.is_gathered(plan, slot) and plan.is_noted(told.in_place[slot.number])
            ]
        for bucket in plan.buckets:
            assert bucket.run is not None
            bucket.run.wait()
        if plan.is_noted(told.refused) and not plan.is_noted(told.changed):
            raise self._refusal()
        if spoiled or plan.is_noted(told.spoiled):
            raise self._loss(spoiled)
        return not plan.is_noted(told.changed)

    @torch.no_grad()
    def fetch(self) -> None:
        """Put results into `.grad`, once the round is finished; collective if gradients are gathered."""
        for bucket in self.plan.buckets:
            fetch(bucket, lambda slot: self._sparse.is_gathered(self.plan, slot))
        self._sparse.reduce(self.plan)

    def _gradient(self, slot: Slot) -> torch.Tensor | None:
        """The parameter's gradient as the engine can read it; None if there is none."""
        grad = slot.parameter.grad
        if grad is None or slot.holds(grad):
            return grad
        if grad.is_sparse:
            if not self._sparse.as_dense:
                return None  # see sparse.py
            grad = slot.parameter.grad = grad.to_dense()
            slot.was_sparse = True
        if grad.is_conj() or grad.is_neg():
            grad = slot.parameter.grad = grad.detach().resolve_conj().resolve_neg()
        if grad.dtype != slot.dtype or grad.shape != slot.shape or grad.device != slot.device:
            what = f"{grad.dtype} {tuple(grad.shape)} on {grad.device}"
            must = f"{slot.dtype} {tuple(slot.shape)} on {slot.device}"
            self._refused.append(f"the gradient of '{slot.name}' is {what}; it must be {must}")
            return None  # so that the round goes on; see finish()
        try:
            arrays.address_of_tensor(grad)
        except UnsupportedTypeError as error:
            self._refused.append(f"the gradient of '{slot.name}': {error}")
            return None
        return grad

    def _is_stale(self, bucket: Bucket) -> bool:
        now = [self._gradient(slot) for slot in bucket.slots]  # of all of them, since it may refuse some
        return any(
            grad is not given or (grad is not None and (grad._version != version or grad.data_ptr() != pointer))
            for grad, (given, version, pointer) in zip(now, bucket.given, strict=True)
        )

    def _refusal(self) -> CollectiveError:
        """What all ranks raise if any of them has a gradient that cannot travel."""
        if not self._refused:
            return UnsupportedTypeError(f"{self._label()}: another rank has a gradient that cannot be reduced")
        return UnsupportedTypeError(f"{self._label()}: rank {runtime.rank()}: {self._refused[0]}")

    def _loss(self, spoiled: list[Slot]) -> CollectiveError:
        """What all ranks raise if a gradient that was reduced in place is lost."""
        if not spoiled:
            return GradientChangedError(
                f"{self._label()}: parameters were added or removed between backward and step, when gradients were "
                "being reduced in place already; change them before backward, or leave gradient_as_bucket_view unset"
            )
        return GradientChangedError(
            f"{self._label()}: on some rank gradients of the bucket of '{spoiled[0].name}' changed between its "
            "backward and synchronize(), while they were being reduced in place. Say how many backward passes make up "
            "a gradient (backward_passes_per_step, no_sync), call synchronize() before gradients are changed, or leave "
            "gradient_as_bucket_view unset"
        )
