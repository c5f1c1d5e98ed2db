"""Gradients to buckets, buckets to the engine, while backward goes on.

The plan. Parameters are dealt to buckets in the order in which the first backward produced their gradients (the mean
over ranks). Order and layout are agreed by all ranks once, when they are first needed; from then on a bucket runs
without any agreement.

A round. From one `synchronize()` to the next every bucket runs exactly once, plus the reruns below, on every rank:

1. A hook after each gradient's accumulation counts; with the last gradient of a bucket the bucket starts.
2. `synchronize()` starts the buckets that are still waiting: what has no gradient on this rank contributes zeros.
   The last bucket, which holds the first layers and whose gradients come last anyway, always starts here. It carries
   notes: which buckets are stale, that is, whose gradients have changed since they started (a second backward, an
   unscale or a clip before synchronize, zero_grad); and which gradients are sparse.
3. A bucket that is stale on any rank runs again on all. So ranks stay in step whatever each of them did, and no
   gradient is ever half of one backward and half of another.
4. `.grad` becomes a view of its place in the bucket, where the result lies; or the result is copied into it. Until
   then the engine only reads gradients, except those that are such views already. A parameter without a gradient on
   some ranks gets one; without a gradient on any rank it keeps None. A gradient that is sparse on any rank is gathered
   from all, outside its bucket.

Views. A gradient that is a view of its bucket is reduced in place, without any copy, and is gone when the bucket has
started: if it then turns out stale, all that is left is an error. So, unless the caller has asked for views, a gradient
is a view from `synchronize()` until `zero_grad()` drops it; one that has not been dropped when the next backward adds
to it is moved out of the bucket, and its results are copied from then on. Results are also copied into gradients that
are part of a larger storage, since somebody may look for them there.

Why this is the default: ResNet-50 on 2 ranks and 2 cores, added to a local step of 200 ms: 8 to 13 ms so; 12 to 22
where results are always copied; 18 to 23 as views throughout, for which zero_grad() has to write zeros and backward to
add to them, where it else hands over the tensor it has made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import arrays, runtime
from ..errors import CollectiveError, GradientChangedError, InvalidArgumentError, UnsupportedTypeError
from ..handles import Handle
from ..process_sets import ProcessSet
from ..submission import Op
from .base_reducer import BaseReducer
from .buckets import Bucket, Groups, Named, Notes, Slot, dense_strides
from .compression import Compressor
from .ops import sparse_allreduce_async
from .plan import Layout, open_plan

__all__ = ["GradientReducer"]


class GradientReducer(BaseReducer):
    """Averages (or sums) the gradients of a set of parameters over all ranks.

    Args:
        label: returns what names the reducer in messages and in the agreement; the same on all ranks, distinct among
            reducers.
        parameters: returns the parameters as they are now, with their names.
        compression: wire format of float32 and float64 gradients.
        op: Average or Sum.
        prescale, postscale: factors on gradients before and after the reduction.
        passes: backward passes that make up a gradient.
        sparse_as_dense: turn sparse gradients into dense ones, rather than gather them.
        sparse_again: and make them sparse again when they are reduced.
        process_set: the ranks that take part.
        groups: buckets of the caller's choice: how many, or which parameters share one.
        as_view: gradients are views of buckets, and reduced in place; None: views while that cannot be noticed;
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
        self._joins = process_set.joins
        self._generation = 0  # of the plan, since then
        self._slots: dict[torch.nn.Parameter, Slot] = {}
        self._arrivals: dict[torch.nn.Parameter, None] = {}  # in this round, in order
        self._plan: list[Bucket] = []
        self._opened = False  # the ranks have agreed on the plan
        self._notes = Notes(0, 0)
        # The plan is no longer that of the parameters: start nothing during backward. None: to be looked at.
        self._hold: bool | None = None
        self._refused: list[str] = []  # which gradients cannot travel, and why
        if not self._is_local:
            self._take(parameters())

    # ---- the plan ----

    def _take(self, parameters: list[Named]) -> None:
        """From here on, these are the parameters; local, the ranks agree in `_open()`."""
        self._plan = []
        self._opened = False
        made_dense = {p for p, slot in self._slots.items() if slot.was_sparse}
        # Backward goes about in reverse.
        self._slots = {
            p: Slot(number, name, p, p.dtype, p.shape, dense_strides(p), p.device)
            for number, (name, p) in enumerate(reversed(parameters))
        }
        for p, slot in self._slots.items():
            slot.was_sparse = p in made_dense
        self._hook_up(self._slots)

    def _is_outdated(self) -> bool:
        """Also where ranks have joined since."""
        return super()._is_outdated() or self._joins != self._process_set.joins

    def _forget(self) -> None:
        """While a rank had joined, plans may have been opened that it knows nothing of, and buckets started here that
        its own script never starts: all ranks begin anew."""
        is_over = self._place != self._current_place()  # and so are its operations
        runs = [] if is_over else [bucket.run for bucket in self._plan if bucket.run is not None]
        super()._forget()
        self._plan = []
        self._opened = False
        for slot in self._slots.values():
            slot.bucket = slot.view = None
        self._joins = self._process_set.joins
        self._generation = 0
        for run in runs:  # in place, perhaps; those who had joined have taken part
            run.wait()

    def _is_changed(self) -> bool:
        """Whether the parameters are no longer those of the plan."""
        parameters = self._parameters()
        return len(parameters) != len(self._slots) or any(
            slot.parameter is not p or slot.dtype != p.dtype or slot.shape != p.shape or slot.device != p.device
            for slot, (_, p) in zip(self._slots.values(), reversed(parameters), strict=True)
        )

    def _open(self) -> None:
        """Agree on the plan with the other ranks; raises MismatchError that names the first difference."""
        self._generation += 1  # also where this fails, so that all ranks count alike
        version = f"{self._joins}.{self._generation}"
        arrived = [self._slots[p] for p in self._arrivals if p in self._slots]
        self._plan, self._notes = open_plan(self.label, version, list(self._slots.values()), arrived, self._layout)
        self._opened = True

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
            return  # a pass too many makes the bucket stale, see synchronize()
        slot.ready = True
        self._arrivals[parameter] = None
        bucket = slot.bucket
        if bucket is None:
            return  # nothing runs before the plan is agreed: backward must not wait for other ranks
        if slot.device.type == "cuda":
            bucket.streams.add(torch.cuda.current_stream(slot.device))
        bucket.waiting -= 1
        if bucket.waiting > 0 or bucket is self._plan[-1]:
            return
        if self._hold is None:
            # In-place buckets cannot be run again, so this must be known before the first one starts.
            self._hold = self._as_view is True and self._is_changed()
        if not self._hold:
            self._start(bucket, [])

    def _gradient(self, slot: Slot) -> torch.Tensor | None:
        """The parameter's gradient as the engine can read it; None where there is none."""
        grad = slot.parameter.grad
        if grad is None or slot.holds(grad):
            return grad
        if grad.is_sparse:
            if not self._sparse_as_dense:
                return None  # see _reduce_sparse()
            grad = slot.parameter.grad = grad.to_dense()
            slot.was_sparse = True
        if grad.is_conj() or grad.is_neg():
            grad = slot.parameter.grad = grad.detach().resolve_conj().resolve_neg()
        if grad.dtype != slot.dtype or grad.shape != slot.shape or grad.device != slot.device:
            what = f"{grad.dtype} {tuple(grad.shape)} on {grad.device}"
            must = f"{slot.dtype} {tuple(slot.shape)} on {slot.device}"
            self._refused.append(f"the gradient of '{slot.name}' is {what}; it must be {must}")
            return None  # so that the round goes on; see _finish_round()
        try:
            arrays.address_of_tensor(grad)
        except UnsupportedTypeError as error:
            self._refused.append(f"the gradient of '{slot.name}': {error}")
            return None
        return grad

    def _start(self, bucket: Bucket, notes: list[int]) -> None:
        for stream in bucket.streams:  # the engine looks at the current one alone
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        bucket.streams.clear()
        pointers = []
        keep = []
        given: list[tuple[torch.Tensor | None, int, int]] = []
        for number, slot in enumerate(bucket.slots):
            grad = self._gradient(slot)
            if not self._as_view:
                grad = self._leave_to_others(bucket, number, grad)
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
        ticket = bucket.core.start(pointers, notes, *arrays.place_of_tensor(bucket.slots[0].parameter))
        bucket.given = given
        bucket.run = Handle(runtime.current().engine, ticket, keep, lambda _: None)

    def _leave_to_others(self, bucket: Bucket, number: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        """Move what is still read from the bucket's memory, before it is written to; the gradient, which may move."""
        slot = bucket.slots[number]
        is_view = slot.holds(grad)
        if not (slot.take_out() if is_view else slot.let_go(bucket.core, number)):
            self._warnings.append(
                f"{self.label}: something that shares memory with an earlier gradient of '{slot.name}' was kept (what "
                f"detach(), numpy(), an index or DLPack makes, or a graph that has saved it), and has been overwritten "
                f"by the next gradient. Copy what is to be kept, or set gradient_as_bucket_view=False. From now on "
                f"results are copied into this gradient."
            )
        return slot.parameter.grad if is_view else grad

    def _is_stale(self, bucket: Bucket) -> bool:
        now = [self._gradient(slot) for slot in bucket.slots]  # of all, for it may refuse some
        return any(
            grad is not given or (grad is not None and (grad._version != version or grad.data_ptr() != pointer))
            for grad, (given, version, pointer) in zip(now, bucket.given, strict=True)
        )

    def _finish_round(self, changed: bool) -> bool:
        """Run every bucket to its end on what gradients there are now; False where any rank has changed its plan."""
        if not self._plan:
            return not self._on_any_rank(changed).any()
        self._refused = []
        last = self._plan[-1]
        told = self._notes
        started = [n for n, bucket in enumerate(self._plan) if bucket.run is not None]
        notes = [told.stale[n] for n in started if self._is_stale(self._plan[n])]
        if changed:
            notes.append(told.changed)
            for slot in self._slots.values():  # out of the way of buckets that are about to run for the last time
                grad = slot.parameter.grad
                if grad is None or not slot.holds(grad):
                    continue
                assert slot.bucket is not None
                if slot.bucket.run is not None:
                    notes.append(told.spoiled)
                slot.take_out()
        for bucket in self._plan[:-1]:
            if bucket.run is None:
                self._start(bucket, [])
        for slot in last.slots:
            self._gradient(slot)  # may refuse it
        for slot in self._slots.values():
            grad = slot.parameter.grad
            if grad is None:
                continue
            if self._as_view and slot.holds(grad):
                notes.append(told.in_place[slot.number])
            elif slot.was_sparse or (grad.is_sparse and not self._sparse_as_dense):
                notes.append(told.sparse[slot.number])
        if self._refused:
            notes.append(told.refused)
        self._start(last, notes)
        assert last.run is not None
        last.run.wait()
        spoiled = []
        if not last.core.noted(told.changed):
            for number, bucket in enumerate(self._plan[:-1]):
                assert bucket.run is not None
                if not last.core.noted(told.stale[number]):
                    continue
                bucket.run.wait()
                gone = [slot for slot in bucket.slots if last.core.noted(told.in_place[slot.number])]
                spoiled += gone
                if not gone:
                    self._start(bucket, [])
            spoiled += [
                slot
                for slot in self._slots.values()
                if self._is_gathered(slot) and last.core.noted(told.in_place[slot.number])
            ]
        for bucket in self._plan:
            assert bucket.run is not None
            bucket.run.wait()
        if last.core.noted(told.refused) and not last.core.noted(told.changed):
            raise self._refusal()
        if spoiled or last.core.noted(told.spoiled):
            raise self._loss(spoiled)
        return not last.core.noted(told.changed)

    def _refusal(self) -> CollectiveError:
        """What all ranks are told where any of them has a gradient that cannot travel."""
        if not self._refused:
            return UnsupportedTypeError(f"{self.label}: another rank has a gradient that cannot be reduced")
        return UnsupportedTypeError(f"{self.label}: rank {runtime.rank()}: {self._refused[0]}")

    def _loss(self, spoiled: list[Slot]) -> CollectiveError:
        """What all ranks are told where a gradient is lost that was reduced in place."""
        if not spoiled:
            return GradientChangedError(
                f"{self.label}: parameters were added or removed between backward and step, when gradients were "
                "being reduced in place already; change them before backward, or leave gradient_as_bucket_view unset"
            )
        return GradientChangedError(
            f"{self.label}: on some rank gradients of the bucket of '{spoiled[0].name}' changed between its backward "
            "and synchronize(), while they were being reduced in place. Say how many backward passes make up a "
            "gradient (backward_passes_per_step, no_sync), call synchronize() before gradients are changed, or leave "
            "gradient_as_bucket_view unset"
        )

    def _reduce(self, changed: bool) -> None:
        if not (self._opened and self._finish_round(changed)):
            self._take(self._parameters())
            self._open()
            self._finish_round(False)
        with torch.no_grad():
            for bucket in self._plan:
                self._fetch(bucket)
            self._reduce_sparse()

    def _fetch(self, bucket: Bucket) -> None:
        """Results to `.grad`."""
        targets = []
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for number, slot in enumerate(bucket.slots):
            p = slot.parameter
            target = p.grad
            if slot.holds(target) or not self._is_reduced(bucket, number):
                if target is not None and slot.holds(target):
                    torch.autograd.graph.increment_version(target)
                targets.append(0)
                continue
            if slot.view is not None and (target is None or _owns_storage(target)):
                if not slot.holds(slot.view):
                    slot.see(bucket.core, number)
                torch.autograd.graph.increment_version(slot.view)
                p.grad = slot.view
                slot.retired = target if slot.device.type == "cpu" else None  # see there: an allocator keeps it
                targets.append(0)
                continue
            if target is None or 0 in target.stride():  # several elements at one address
                target = p.grad = torch.empty_strided(slot.shape, slot.strides, dtype=slot.dtype, device=slot.device)
            if target.stride() != slot.strides or target.dtype != bucket.dtype:
                grad = target
                target = torch.empty_strided(slot.shape, slot.strides, dtype=bucket.dtype, device=slot.device)
                copies.append((grad, target))
            torch.autograd.graph.increment_version(target)
            targets.append(target.data_ptr())
        if any(targets):
            bucket.core.fetch(targets, *arrays.place_of_tensor(bucket.slots[0].parameter))
        for grad, copy in copies:
            grad.copy_(copy)

    def _is_reduced(self, bucket: Bucket, number: int) -> bool:
        """Whether the bucket holds a result for its member."""
        return bucket.core.present(number) and not self._is_gathered(bucket.slots[number])

    def _is_gathered(self, slot: Slot) -> bool:
        return not self._sparse_as_dense and self._is_sparse_somewhere(slot)

    def _is_sparse_somewhere(self, slot: Slot) -> bool:
        return self._plan[-1].core.noted(self._notes.sparse[slot.number])

    def _reduce_sparse(self) -> None:
        """Gather the gradients that are sparse on any rank; or make them sparse again."""
        if self._sparse_as_dense:
            for slot in self._slots.values():
                grad = slot.parameter.grad
                if self._sparse_again and grad is not None and self._is_sparse_somewhere(slot):
                    slot.parameter.grad = grad.to_sparse(1)
            return
        sums = []
        layout = self._layout
        for slot in self._slots.values():
            if not self._is_sparse_somewhere(slot):
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
            name = f"{self.label}.sparse.{slot.name}"
            scaled = grad * layout.prescale if layout.prescale != 1.0 else grad
            sums.append((p, sparse_allreduce_async(scaled, name, layout.op, layout.process_set)))
        for p, finish in sums:
            total = finish()
            p.grad = total * layout.postscale if layout.postscale != 1.0 else total

    def _begin_round(self) -> None:
        for bucket in self._plan:
            bucket.run = None
            bucket.given = []
            bucket.waiting = len(bucket.slots)
        for slot in self._slots.values():
            slot.passes = 0
            slot.ready = slot.was_sparse = False
        self._arrivals = {}
        self._hold = None


def _owns_storage(grad: torch.Tensor) -> bool:
    """Whether it is all of its storage, so that nobody looks for the result in a larger buffer."""
    return grad.untyped_storage().nbytes() <= grad.nbytes


def check_passes(passes: int) -> int:
    """A valid number of backward passes per step."""
    if not isinstance(passes, int) or passes < 1:
        raise InvalidArgumentError(f"backward_passes_per_step is a positive integer, not {passes!r}")
    return passes
