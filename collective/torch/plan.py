"""The plan of a reducer: its buckets, which all ranks agree on once, before the first one runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .. import _core, arrays, runtime
from ..devices import prepare
from ..errors import InvalidArgumentError
from ..handles import Handle
from ..process_sets import ProcessSet
from ..submission import Op, reduce_op, wire_dtype
from .buckets import Bucket, Groups, Notes, Slot, c_strides, deal
from .compression import Compressor, wire_of

__all__ = ["Layout", "Plan", "open_plan"]


@dataclass(frozen=True)
class Layout:
    """What a plan is made from, besides the parameters."""

    compression: type[Compressor]
    op: Op
    prescale: float
    postscale: float
    process_set: ProcessSet
    groups: Groups
    may_view: bool


@dataclass(frozen=True)
class Plan:
    """What the ranks have agreed on: the places of all parameters, the buckets, and the notes in the last of them."""

    slots: Sequence[Slot]
    buckets: Sequence[Bucket]  # none: no rank has anything to train
    notes: Notes

    def is_noted(self, note: int) -> bool:
        """Whether any rank has sent this note in the round, whose last bucket is complete."""
        return self.buckets[-1].core.noted(note)

    def is_sparse(self, slot: Slot) -> bool:
        """Whether the gradient was sparse on any rank in the round."""
        return self.is_noted(self.notes.sparse[slot.number])


def open_plan(label: str, version: str, slots: Sequence[Slot], arrived: Sequence[Slot], layout: Layout) -> Plan:
    """Agree on the plan with the other ranks of the set; collective.

    Args:
        label: the reducer's name in messages.
        version: of the plan, the same on all ranks and new each time.
        slots: one for each parameter, by number; they learn their buckets.
        arrived: those whose gradients have come, in order of arrival.
        layout: how the buckets are made; the same on all ranks, except for `may_view`.

    Returns:
        The plan. Raises a MismatchError that names the first difference between ranks.
    """
    group = layout.process_set.group
    if group is None:
        raise InvalidArgumentError(f"{label}: rank {runtime.rank()} is not in {layout.process_set}")
    engine = runtime.current().engine
    threshold = runtime.current().config.fusion_threshold if layout.process_set.rank() == 0 else 0
    order, threshold = _agreed_order(engine, group, f"{label}.order{version}", slots, arrived, threshold)
    dealt = deal(order, layout.groups, threshold)
    if not dealt:
        return Plan(slots, [], Notes(0, 0))
    number_of = {slot: number for number, members in enumerate(dealt) for slot in members}
    notes = Notes(len(dealt), len(slots))
    noted = [0] * (len(dealt) - 1) + [notes.count]
    devices = [arrays.place_of_tensor(members[0].parameter)[0] for members in dealt]
    dtypes = [arrays.view(torch.empty(0, dtype=members[0].dtype, device="cpu")).dtype for members in dealt]
    wires = [wire_dtype(wire_of(layout.compression), dtype) for dtype in dtypes]
    layouts = [
        _core.BucketLayout(dtype, wire, [slot.shape.numel() for slot in members], more, device)
        for dtype, wire, members, more, device in zip(dtypes, wires, dealt, noted, devices, strict=True)
    ]
    described = "".join(f"{_described(slot)} in bucket {number_of[slot]}\n" for slot in slots)
    # Buckets are on the device of their gradients if all are on one; if there are several, they go by the host.
    device, stream = arrays.place_of_tensor(dealt[0][0].parameter) if len(set(devices)) == 1 else (-1, 0)
    prepare(device)
    opening = _core.open_buckets(
        engine=engine,
        group=group,
        name=f"{label}.plan{version}",
        layouts=layouts,
        dtype=_core.DType.float32,
        wire=wire_dtype(wire_of(layout.compression), _core.DType.float32),
        op=reduce_op(layout.op),
        prescale=layout.prescale,
        postscale=layout.postscale,
        described=described,
        kind="cpu" if all(at < 0 for at in devices) else "cuda",
        device=device,
        stream=stream,
    )
    Handle(engine, opening.ticket, None, lambda _: None).wait()
    buckets = []
    for members, core in zip(dealt, opening.buckets([_contents(members) for members in dealt]), strict=True):
        # On a device, compressed gradients are cast before they leave it.
        bucket = Bucket(members, core, getattr(torch, core.dtype.name))
        buckets.append(bucket)
        at = arrays.place_of_tensor(members[0].parameter)[0]
        viewable = (at < 0 or core.on_device) and layout.may_view and core.dtype == wires[len(buckets) - 1]
        for i, slot in enumerate(members):
            slot.bucket = bucket
            if viewable and slot.shape.numel() > 0:
                slot.see(core, i)
    return Plan(slots, buckets, notes)


def _agreed_order(
    engine: _core.Engine, group: int, name: str, slots: Sequence[Slot], arrived: Sequence[Slot], threshold: int
) -> tuple[list[Slot], int]:
    """All slots in the order in which their gradients came, averaged over ranks (those that did not come are last); and
    the sum of the ranks' thresholds, which all but one give as 0."""
    sums = np.full(len(slots) + 1, len(slots), dtype=np.int64)
    sums[[slot.number for slot in arrived]] = range(len(arrived))
    sums[-1] = threshold
    dtype = _core.DType.int64
    described = "".join(f"{_described(slot)}\n" for slot in slots)
    total = (_core.Kind.allreduce, sums.shape, dtype, dtype, _core.ReduceOp.Sum, 1.0, 1.0, 0, "cpu", described)
    address = sums.ctypes.data
    ticket = engine.submit(group, name, _core.Descriptor(*total), address, address, (), False, True)
    Handle(engine, ticket, sums, lambda _: None).wait()
    return [slots[number] for number in np.argsort(sums[:-1], kind="stable")], int(sums[-1])


def _contents(members: Sequence[Slot]) -> str:
    """The parameters of a bucket, for messages."""
    if len(members) <= 2:
        return ", ".join(slot.name for slot in members)
    return f"{members[0].name} to {members[-1].name}, {len(members)} parameters"


def _described(slot: Slot) -> str:
    strides = "" if slot.strides == c_strides(slot.parameter) else f" strides {slot.strides}"
    device = "" if slot.device.type == "cpu" else f" on {slot.device.type}"
    return f"{slot.name} {str(slot.dtype).removeprefix('torch.')} {tuple(slot.shape)}{strides}{device}"
