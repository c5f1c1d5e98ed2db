"""Gradients to buckets, buckets to the engine, while backward goes on.

The plan. Parameters are laid out in buckets in reverse order of registration, which is about the order in which
backward finishes their gradients. The layout is agreed by all ranks once, when it is first needed; from then on a
bucket runs without any agreement.

A round. From one `synchronize()` to the next every bucket runs exactly once, plus the reruns below, on every rank:

1. A hook after each gradient's accumulation counts; with the last gradient of a bucket the bucket starts.
2. `synchronize()` starts the buckets that are still waiting: what has no gradient on this rank contributes zeros.
   The last bucket, which holds the first layers and whose gradients come last anyway, always starts here. It carries
   notes: which buckets are stale, that is, whose gradients have changed since they started (a second backward, an
   unscale or a clip before synchronize, zero_grad).
3. A bucket that is stale on any rank runs again on all. So ranks stay in step whatever each of them did, and no
   gradient is ever half of one backward and half of another.
4. Results are copied from the buckets into `.grad`. Before that the engine only reads gradients. A parameter without
   a gradient on some ranks gets one; without a gradient on any rank it keeps None.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .. import _core, arrays, runtime
from ..errors import InvalidArgumentError, UnsupportedTypeError
from ..handles import Handle
from ..ops import Op, reduce_op, wire_dtype
from .compression import Compressor

__all__ = ["GradientReducer"]


@dataclass(eq=False)
class _Slot:
    """A parameter's place in its bucket."""

    name: str
    parameter: torch.nn.Parameter
    bucket: _Bucket
    strides: tuple[int, ...]  # of its elements in the bucket
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
    return tuple(torch.empty(p.shape, device="meta").stride())


class GradientReducer:
    """Averages (or sums) the gradients of a set of parameters over all ranks.

    Args:
        label: names the reducer in messages and in the agreement; the same on all ranks, distinct among reducers.
        compression: wire format of float32 and float64 gradients.
        op: Average or Sum.
        prescale, postscale: factors on gradients before and after the reduction.
        passes: backward passes that make up a gradient.
        sparse_as_dense: turn sparse gradients into dense ones, rather than refuse them.
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
    ) -> None:
        self.label = label
        self.passes = passes
        self.enabled = True  # False: hooks do not count, see no_sync()
        self.synchronized = False  # no gradient has come since the last synchronize()
        self._compression = compression
        self._op = op
        self._prescale = prescale
        self._postscale = postscale
        self._sparse_as_dense = sparse_as_dense
        self._plan: list[_Bucket] = []
        self._planned: list[torch.nn.Parameter] = []
        self._opened = False
        self._generation = 0
        self._slots: dict[torch.nn.Parameter, _Slot] = {}
        self._hooked: set[torch.nn.Parameter] = set()

    # ---- the plan ----

    def lay_out(self, parameters: list[tuple[str, torch.nn.Parameter]]) -> None:
        """Make the plan for these parameters, unless it is for them already; local, the ranks agree later."""
        wanted = [parameter for _, parameter in parameters]
        if len(wanted) == len(self._planned) and all(a is b for a, b in zip(wanted, self._planned, strict=True)):
            return
        if any(bucket.run is not None for bucket in self._plan):
            self._finish_round()  # of the old plan, so that no run is left half way
        self._planned = wanted
        self._plan = []
        self._slots = {}
        self._opened = False
        self._generation += 1
        state = runtime.current()
        if state.topology.size == 1:
            return  # gradients are what they are
        limit = state.config.fusion_threshold
        filled: dict[torch.dtype, tuple[_Bucket, int]] = {}
        for name, parameter in reversed(parameters):
            nbytes = parameter.numel() * parameter.element_size()
            bucket, used = filled.get(parameter.dtype, (None, 0))
            if bucket is None or (used > 0 and used + nbytes > limit):
                bucket, used = _Bucket(), 0
                self._plan.append(bucket)
            filled[parameter.dtype] = (bucket, used + nbytes)
            slot = _Slot(name, parameter, bucket, _dense_strides(parameter))
            bucket.slots.append(slot)
            self._slots[parameter] = slot
            if parameter not in self._hooked:
                self._hooked.add(parameter)
                parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
        for bucket in self._plan:
            bucket.waiting = len(bucket.slots)

    def _open(self) -> None:
        """Agree on the plan with the other ranks; raises MismatchError that names the first difference."""
        state = runtime.current()
        layout = "".join(
            f"{slot.name} {str(slot.parameter.dtype).removeprefix('torch.')} {tuple(slot.parameter.shape)}"
            f"{'' if slot.parameter.is_contiguous() else f' strides {slot.strides}'} in bucket {number}\n"
            for number, bucket in enumerate(self._plan)
            for slot in bucket.slots
        )
        name = f"{self.label}.plan{self._generation}"
        wire = wire_dtype(self._compression.wire, _core.DType.float32)
        ticket = state.engine.submit(
            _core.Kind.channel,
            name,
            (len(self._plan),),
            _core.DType.float32,
            wire,
            reduce_op(self._op),
            self._prescale,
            self._postscale,
            0,
            "cpu",
            layout,
            0,
            0,
            False,
            True,
        )
        first: int = Handle(state.engine, ticket, None, lambda done: done.channel).wait()
        for number, bucket in enumerate(self._plan):
            dtype = arrays.view(torch.empty(0, dtype=bucket.slots[0].parameter.dtype)).dtype
            bucket.core = _core.Bucket(
                engine=state.engine,
                name=f"{name}.bucket{number}",
                channel=first + number,
                dtype=dtype,
                wire=wire_dtype(self._compression.wire, dtype),
                op=reduce_op(self._op),
                prescale=self._prescale,
                postscale=self._postscale,
                counts=[slot.parameter.numel() for slot in bucket.slots],
                notes=len(self._plan) if bucket is self._plan[-1] else 0,
            )
        self._opened = True

    # ---- a round ----

    def _on_gradient(self, parameter: torch.nn.Parameter) -> None:
        slot = self._slots.get(parameter)
        if slot is None or not self.enabled:
            return
        self.synchronized = False
        slot.passes += 1
        if slot.ready or slot.passes < self.passes:
            return  # a pass too many makes the bucket stale, see synchronize()
        slot.ready = True
        bucket = slot.bucket
        bucket.waiting -= 1
        if bucket.waiting == 0 and bucket is not self._plan[-1]:
            self._start(bucket, [])

    def _gradient(self, slot: _Slot) -> torch.Tensor | None:
        """The parameter's gradient as the engine can read it; None where there is none."""
        grad = slot.parameter.grad
        if grad is None:
            return None
        if grad.is_sparse:
            if not self._sparse_as_dense:
                raise UnsupportedTypeError(
                    f"{self.label}: the gradient of '{slot.name}' is sparse; pass sparse_as_dense=True to reduce it "
                    f"as a dense tensor"
                )
            grad = slot.parameter.grad = grad.to_dense()
        if grad.device.type != "cpu":
            raise UnsupportedTypeError(
                f"{self.label}: the gradient of '{slot.name}' is on {grad.device}, not on the CPU"
            )
        return grad

    def _start(self, bucket: _Bucket, notes: list[int]) -> None:
        if not self._opened:
            self._open()
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
            slot.parameter.grad is not grad or (grad is not None and grad._version != version)
            for slot, (grad, version) in zip(bucket.slots, bucket.given, strict=True)
        )

    def _finish_round(self) -> None:
        """Run every bucket to its end on what gradients there are now."""
        if not self._plan:
            return
        stale = [n for n, bucket in enumerate(self._plan) if bucket.run is not None and self._is_stale(bucket)]
        for bucket in self._plan[:-1]:
            if bucket.run is None:
                self._start(bucket, [])
        last = self._plan[-1]
        self._start(last, stale)
        assert last.run is not None and last.core is not None
        last.run.wait()
        for number, bucket in enumerate(self._plan[:-1]):
            assert bucket.run is not None
            if last.core.noted(number):
                bucket.run.wait()
                self._start(bucket, [])
        for bucket in self._plan:
            assert bucket.run is not None
            bucket.run.wait()

    def synchronize(self) -> None:
        """Wait until every gradient is reduced on every rank, and put the results into `.grad`; collective."""
        try:
            self._finish_round()
            with torch.no_grad():
                for bucket in self._plan:
                    self._fetch(bucket)
        finally:
            self._begin_round()
        self.synchronized = True

    def _fetch(self, bucket: _Bucket) -> None:
        assert bucket.core is not None
        targets = []
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for number, slot in enumerate(bucket.slots):
            p = slot.parameter
            if not bucket.core.present(number):
                targets.append(0)
                continue
            if p.grad is None:
                p.grad = torch.empty_strided(p.shape, slot.strides, dtype=p.dtype)
            target = p.grad
            if target.stride() != slot.strides:
                target = torch.empty_strided(p.shape, slot.strides, dtype=p.dtype)
                copies.append((p.grad, target))
            targets.append(target.data_ptr())
        bucket.core.fetch(targets)
        for grad, copy in copies:
            grad.copy_(copy)

    def _begin_round(self) -> None:
        for bucket in self._plan:
            bucket.run = None
            bucket.given = []
            bucket.waiting = len(bucket.slots)
            for slot in bucket.slots:
                slot.passes = 0
                slot.ready = False


def check_passes(passes: int) -> int:
    """A valid number of backward passes per step."""
    if not isinstance(passes, int) or passes < 1:
        raise InvalidArgumentError(f"backward_passes_per_step is a positive integer, not {passes!r}")
    return passes
