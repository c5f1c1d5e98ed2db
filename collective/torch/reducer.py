"""Gradients to buckets, buckets to the engine, while backward goes on.

The plan. Parameters are laid out in buckets in reverse order of registration, which is about the order in which
backward finishes their gradients. The layout is agreed by all ranks once, when it is first needed; from then on a
bucket runs without any agreement.

A round. From one `synchronize()` to the next every bucket runs exactly once, plus the reruns below, on every rank:

1. A hook after each gradient's accumulation counts; with the last gradient of a bucket the bucket starts.
2. `synchronize()` starts the buckets that are still waiting: what has no gradient on this rank contributes zeros.
   The last bucket, which holds the first layers and whose gradients come last anyway, always starts here. It carries
   notes: which buckets are stale, that is, whose gradients have changed since they started (a second backward, an
   unscale or a clip before synchronize, zero_grad); and which gradients are sparse.
3. A bucket that is stale on any rank runs again on all. So ranks stay in step whatever each of them did, and no
   gradient is ever half of one backward and half of another.
4. Results are copied from the buckets into `.grad`. Before that the engine only reads gradients. A parameter without
   a gradient on some ranks gets one; without a gradient on any rank it keeps None. A gradient that is sparse on any
   rank is gathered from all, outside its bucket.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .. import _core, arrays, ops, runtime
from ..errors import InvalidArgumentError, UnsupportedTypeError
from ..handles import Handle
from ..process_sets import ProcessSet
from ..submission import Op, reduce_op, wire_dtype
from .compression import Compressor
from .ops import sparse_allreduce_async

__all__ = ["GradientReducer"]


_Named = tuple[str, torch.nn.Parameter]


def _by_dtype(parameters: list[_Named]) -> list[list[_Named]]:
    """In the order of first appearance."""
    parts: dict[torch.dtype, list[_Named]] = {}
    for name, p in parameters:
        parts.setdefault(p.dtype, []).append((name, p))
    return list(parts.values())


@dataclass(eq=False)
class _Slot:
    """A parameter's place in its bucket."""

    name: str
    parameter: torch.nn.Parameter
    bucket: _Bucket
    strides: tuple[int, ...]  # of its elements in the bucket
    number: int = -1  # among all
    passes: int = 0  # backward passes in this round
    ready: bool = False


@dataclass(eq=False)
class _Bucket:
    slots: list[_Slot] = field(default_factory=list)
    waiting: int = 0  # slots that are not ready
    core: _core.Bucket | None = None
    run: Handle[None] | None = None  # of this round
    # What the run was given: gradient and its version, by slot.
    given: list[tuple[torch.Tensor | None, int]] = field(default_factory=list)


def _dense_strides(p: torch.Tensor) -> tuple[int, ...]:
    """The strides in which p's elements fill memory without gaps: its own where they do, else C order."""
    if p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last):
        return tuple(p.stride())
    if p.dim() == 5 and p.is_contiguous(memory_format=torch.channels_last_3d):
        return tuple(p.stride())
    return _c_strides(p)


def _c_strides(p: torch.Tensor) -> tuple[int, ...]:
    return tuple(torch.empty(p.shape, device="meta").stride())


class GradientReducer:
    """Averages (or sums) the gradients of a set of parameters over all ranks.

    Args:
        label: names the reducer in messages and in the agreement; the same on all ranks, distinct among reducers.
        compression: wire format of float32 and float64 gradients.
        op: Average or Sum.
        prescale, postscale: factors on gradients before and after the reduction.
        passes: backward passes that make up a gradient.
        sparse_as_dense: turn sparse gradients into dense ones, rather than gather them.
        process_set: the ranks that take part.
        groups: buckets of the caller's choice: how many, or which parameters share one.
    """

    def __init__(
        self,
        label: str,
        *,
        compression: type[Compressor],
        op: Op,
        prescale: float,
        postscale: float,
        passes: int,
        sparse_as_dense: bool,
        process_set: ProcessSet,
        groups: int | list[list[torch.nn.Parameter]] | None,
    ) -> None:
        self.label = label
        self.passes = passes
        self.enabled = True  # False: hooks do not count, see no_sync()
        self.synchronized = False  # synchronize() was called after the last step: alike on all ranks
        self._fresh = False  # a gradient has come to this rank since
        self._compression = compression
        self._op = op
        self._prescale = prescale
        self._postscale = postscale
        self._sparse_as_dense = sparse_as_dense
        self._process_set = process_set
        self._groups = groups
        self._plan: list[_Bucket] = []
        self._planned: list[torch.nn.Parameter] = []
        self._opened = False
        self._generation = 0
        self._slots: dict[torch.nn.Parameter, _Slot] = {}
        self._refused: _Slot | None = None  # whose gradient cannot travel
        self._hooked: set[torch.nn.Parameter] = set()
        # The parameters, which outlive this reducer, hold no reference to it.
        self._hooks: list[Any] = []
        weakref.finalize(self, _remove, self._hooks)
        reducer = weakref.ref(self)

        def hook(parameter: torch.nn.Parameter) -> None:
            if (alive := reducer()) is not None:
                alive._on_gradient(parameter)

        self._hook = hook

    # ---- the plan ----

    def lay_out(self, parameters: list[_Named]) -> None:
        """Make the plan for these parameters; local, the ranks agree in `_open()`."""
        self._planned = [parameter for _, parameter in parameters]
        self._plan = []
        self._slots = {}
        self._opened = False
        if self._process_set.size() == 1:
            return  # gradients are what they are
        for members in self._deal(list(reversed(parameters))):
            bucket = _Bucket(waiting=len(members))
            self._plan.append(bucket)
            for name, parameter in members:
                slot = _Slot(name, parameter, bucket, _dense_strides(parameter))
                bucket.slots.append(slot)
                self._slots[parameter] = slot
        # Numbered and told to the others in one order, whatever the buckets are.
        self._slots = {p: self._slots[p] for _, p in reversed(parameters)}
        for number, (parameter, slot) in enumerate(self._slots.items()):
            slot.number = number
            if parameter not in self._hooked:
                self._hooked.add(parameter)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._hook))  # type: ignore[no-untyped-call]

    def _deal(self, parameters: list[_Named]) -> list[list[_Named]]:
        """The members of each bucket."""
        if isinstance(self._groups, int) and self._groups > 0:
            size = -(-len(parameters) // self._groups)
            parts = [parameters[first : first + size] for first in range(0, len(parameters), size)]
            return [bucket for part in parts for bucket in _by_dtype(part)]
        chosen: list[list[_Named]] = []
        if isinstance(self._groups, list):
            group_of = {p: number for number, group in enumerate(self._groups) for p in group}
            parts = [[] for _ in self._groups]
            for name, p in parameters:
                if p in group_of:
                    parts[group_of[p]].append((name, p))
            chosen = [bucket for part in parts for bucket in _by_dtype(part)]
            parameters = [(name, p) for name, p in parameters if p not in group_of]
        limit = runtime.current().config.fusion_threshold
        for part in _by_dtype(parameters):
            chosen.append([])
            used = 0
            for name, p in part:
                nbytes = p.numel() * p.element_size()
                if chosen[-1] and used + nbytes > limit:
                    chosen.append([])
                    used = 0
                chosen[-1].append((name, p))
                used += nbytes
        return chosen

    def _open(self) -> None:
        """Agree on the plan with the other ranks; raises MismatchError that names the first difference."""
        state = runtime.current()
        number_of = {id(bucket): number for number, bucket in enumerate(self._plan)}
        layout = "".join(
            f"{slot.name} {str(slot.parameter.dtype).removeprefix('torch.')} {tuple(slot.parameter.shape)}"
            f"{'' if slot.strides == _c_strides(slot.parameter) else f' strides {slot.strides}'} "
            f"in bucket {number_of[id(slot.bucket)]}\n"
            for slot in self._slots.values()
        )
        self._generation += 1  # also where this fails, so that all ranks count alike
        name = f"{self.label}.plan{self._generation}"
        group = self._process_set.group
        if group is None:
            raise InvalidArgumentError(f"{self.label}: rank {runtime.rank()} is not in {self._process_set}")
        dtypes = [arrays.view(torch.empty(0, dtype=b.slots[0].parameter.dtype)).dtype for b in self._plan]
        wires = [wire_dtype(self._compression.wire, dtype) for dtype in dtypes]
        counts = [[slot.parameter.numel() for slot in bucket.slots] for bucket in self._plan]
        notes = [0] * (len(self._plan) - 1) + [len(self._plan) + len(self._slots) + 2] if self._plan else []
        # Dtype, wire and elements of each bucket, flags included.
        extents = [
            n
            for dtype, wire, count, noted in zip(dtypes, wires, counts, notes, strict=True)
            for n in (int(dtype.value), int(wire.value), sum(count) + len(count) + noted)
        ]
        op = reduce_op(self._op)
        dtype = _core.DType.float32
        descriptor = _core.Descriptor(
            _core.Kind.channel,
            extents,
            dtype,
            wire_dtype(self._compression.wire, dtype),
            op,
            self._prescale,
            self._postscale,
            0,
            "cpu",
            layout,
        )
        ticket = state.engine.submit(group, name, descriptor, 0, 0, (), False, True)
        Handle(state.engine, ticket, None, lambda _: None).wait()
        for number, bucket in enumerate(self._plan):
            bucket.core = _core.Bucket(
                engine=state.engine,
                group=group,
                name=f"{name}.bucket{number}",
                opened=ticket,
                number=number,
                dtype=dtypes[number],
                wire=wires[number],
                op=op,
                prescale=self._prescale,
                postscale=self._postscale,
                counts=counts[number],
                notes=notes[number],
            )
        self._opened = True

    # ---- a round ----

    def _on_gradient(self, parameter: torch.nn.Parameter) -> None:
        self._fresh = True
        slot = self._slots.get(parameter)
        if slot is None or not self.enabled:
            return
        slot.passes += 1
        if slot.ready or slot.passes < self.passes:
            return  # a pass too many makes the bucket stale, see synchronize()
        slot.ready = True
        bucket = slot.bucket
        bucket.waiting -= 1
        # Nothing runs before the plan is agreed: backward must not wait for other ranks.
        if bucket.waiting == 0 and bucket is not self._plan[-1] and self._opened:
            self._start(bucket, [])

    def _gradient(self, slot: _Slot) -> torch.Tensor | None:
        """The parameter's gradient as the engine can read it; None where there is none."""
        grad = slot.parameter.grad
        if grad is None:
            return None
        if grad.is_sparse:
            if not self._sparse_as_dense:
                return None  # see _reduce_sparse()
            grad = slot.parameter.grad = grad.to_dense()
        if grad.is_conj() or grad.is_neg():
            grad = slot.parameter.grad = grad.detach().resolve_conj().resolve_neg()
        if grad.dtype != slot.parameter.dtype or grad.device.type != "cpu":
            self._refused = slot
            return None  # so that the round goes on; see _finish_round()
        return grad

    def _start(self, bucket: _Bucket, notes: list[int]) -> None:
        assert bucket.core is not None
        pointers = []
        keep = []
        given: list[tuple[torch.Tensor | None, int]] = []
        for slot in bucket.slots:
            grad = self._gradient(slot)
            given.append((grad, -1 if grad is None else grad._version))
            if grad is None:
                pointers.append(0)
                continue
            if grad.stride() != slot.strides:
                grad = torch.empty_strided(grad.shape, slot.strides, dtype=grad.dtype).copy_(grad.detach())
            keep.append(grad)
            pointers.append(grad.data_ptr())
        ticket = bucket.core.start(pointers, notes)
        bucket.given = given
        bucket.run = Handle(runtime.current().engine, ticket, keep, lambda _: None)

    def _is_stale(self, bucket: _Bucket) -> bool:
        return any(
            self._gradient(slot) is not grad or (grad is not None and grad._version != version)
            for slot, (grad, version) in zip(bucket.slots, bucket.given, strict=True)
        )

    def _finish_round(self, changed: bool) -> bool:
        """Run every bucket to its end on what gradients there are now; False where any rank has changed its plan."""
        if not self._plan:
            return not self._on_any_rank(changed)
        self._refused = None
        stale = [n for n, bucket in enumerate(self._plan) if bucket.run is not None and self._is_stale(bucket)]
        for bucket in self._plan[:-1]:
            if bucket.run is None:
                self._start(bucket, [])
        last = self._plan[-1]
        sparse = [
            len(self._plan) + slot.number
            for slot in self._slots.values()
            if slot.parameter.grad is not None and slot.parameter.grad.is_sparse and not self._sparse_as_dense
        ]
        change = len(self._plan) + len(self._slots)
        refused = change + 1
        for slot in last.slots:
            self._gradient(slot)  # may refuse it
        self._start(
            last,
            stale + sparse + ([change] if changed else []) + ([refused] if self._refused is not None else []),
        )
        assert last.run is not None
        assert last.core is not None
        last.run.wait()
        if last.core.noted(change):
            for bucket in self._plan:
                assert bucket.run is not None
                bucket.run.wait()
            return False
        for number, bucket in enumerate(self._plan[:-1]):
            assert bucket.run is not None
            if last.core.noted(number):
                bucket.run.wait()
                self._start(bucket, [])
        for bucket in self._plan:
            assert bucket.run is not None
            bucket.run.wait()
        if last.core.noted(refused):
            raise self._refusal()
        return True

    def _refusal(self) -> UnsupportedTypeError:
        """What all ranks are told where any of them has a gradient that cannot travel."""
        if self._refused is None:
            return UnsupportedTypeError(f"{self.label}: another rank has a gradient that cannot be reduced")
        p = self._refused.parameter
        assert p.grad is not None
        return UnsupportedTypeError(
            f"{self.label}: the gradient of '{self._refused.name}' is {p.grad.dtype} on {p.grad.device}; "
            f"it must be {p.dtype} on the CPU"
        )

    def _on_any_rank(self, flag: bool) -> bool:
        own = np.array([flag], dtype=np.uint8)
        return bool(ops.allreduce(own, Op.Max, name=f"{self.label}.on_any_rank", process_set=self._process_set)[0])

    def synchronize(self, parameters: list[_Named]) -> None:
        """Wait until every gradient is reduced on every rank, and put the results into `.grad`; collective.

        Called again before the next step, it reduces again only if gradients have come to any rank.
        """
        if self._process_set.size() == 1:
            for _, p in parameters:
                if self._sparse_as_dense and p.grad is not None and p.grad.is_sparse:
                    p.grad = p.grad.to_dense()
            return
        changed = len(parameters) != len(self._planned) or any(
            a is not b for (_, a), b in zip(parameters, self._planned, strict=True)
        )
        if self.synchronized and not self._on_any_rank(self._fresh or changed):
            return
        try:
            if not (self._opened and self._finish_round(changed)):
                self._begin_round()
                self.lay_out(parameters)
                self._open()
                self._finish_round(False)
            with torch.no_grad():
                for bucket in self._plan:
                    self._fetch(bucket)
                self._reduce_sparse()
        finally:
            self._begin_round()
        self.synchronized = True
        self._fresh = False

    def _fetch(self, bucket: _Bucket) -> None:
        assert bucket.core is not None
        targets = []
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for number, slot in enumerate(bucket.slots):
            p = slot.parameter
            if not bucket.core.present(number) or self._is_sparse_somewhere(slot):
                targets.append(0)
                continue
            if p.grad is None:
                p.grad = torch.empty_strided(p.shape, slot.strides, dtype=p.dtype)
            target = p.grad
            if target.stride() != slot.strides:
                target = torch.empty_strided(p.shape, slot.strides, dtype=p.dtype)
                if 0 in p.grad.stride():  # several elements at one address
                    p.grad = target
                else:
                    copies.append((p.grad, target))
            targets.append(target.data_ptr())
        bucket.core.fetch(targets)
        for grad, copy in copies:
            grad.copy_(copy)

    def _is_sparse_somewhere(self, slot: _Slot) -> bool:
        core = self._plan[-1].core
        assert core is not None
        return core.noted(len(self._plan) + slot.number)

    def _reduce_sparse(self) -> None:
        """Gather the gradients that are sparse on any rank."""
        sums = []
        for slot in self._slots.values():
            if not self._is_sparse_somewhere(slot):
                continue
            p = slot.parameter
            grad = p.grad
            if grad is None:
                grad = torch.sparse_coo_tensor(
                    torch.empty((1, 0), dtype=torch.int64),
                    torch.empty((0, *p.shape[1:]), dtype=p.dtype),
                    p.shape,
                    check_invariants=True,
                )
            elif not grad.is_sparse:
                grad = grad.to_sparse(1)
            name = f"{self.label}.sparse.{slot.name}"
            scaled = grad * self._prescale if self._prescale != 1.0 else grad
            sums.append((p, sparse_allreduce_async(scaled, name, self._op, self._process_set)))
        for p, finish in sums:
            total = finish()
            p.grad = total * self._postscale if self._postscale != 1.0 else total

    def _begin_round(self) -> None:
        for bucket in self._plan:
            bucket.run = None
            bucket.given = []
            bucket.waiting = len(bucket.slots)
            for slot in bucket.slots:
                slot.passes = 0
                slot.ready = False


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def check_passes(passes: int) -> int:
    """A valid number of backward passes per step."""
    if not isinstance(passes, int) or passes < 1:
        raise InvalidArgumentError(f"backward_passes_per_step is a positive integer, not {passes!r}")
    return passes
