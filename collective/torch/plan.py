"""The plan of a reducer: its buckets, which all ranks agree on once, before the first of them runs."""

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
    """What the ranks have agreed on: the places of all parameters, the buckets, and what the last of them tells."""

    slots: Sequence[Slot]
    buckets: Sequence[Bucket]  # none: no rank has anything to train
    notes: Notes

    def is_noted(self, note: int) -> bool:
        """Whether any rank has told this in the round, whose last bucket has ended."""
        return self.buckets[-1].core.noted(note)

    def is_sparse(self, slot: Slot) -> bool:
        """Whether the gradient was sparse on any rank in the round."""
        return self.is_noted(self.notes.sparse[slot.number])


def open_plan(label: str, version: str, slots: Sequence[Slot], arrived: Sequence[Slot], layout: Layout) -> Plan:
    """Agree on the plan with the other ranks of the set; collective.

    Args:
        label: names the reducer in messages.
        version: of the plan, alike on all ranks and new each time.
        slots: one for each parameter, by number; they learn their buckets.
        arrived: those whose gradients have come, in that order.
        layout: how the buckets are made; alike on all ranks, but for `may_view`.

    Returns:
        The plan. Raises MismatchError that names the first difference between ranks.
    """
    group = layout.process_set.group
    if group is None:
        raise InvalidArgumentError(f"{label}: rank {runtime.rank()} is not in {layout.process_set}")
    engine = runtime.current().engine
    order = _agreed_order(engine, group, f"{label}.order{version}", slots, arrived)
    dealt = deal(order, layout.groups, runtime.current().config.fusion_threshold)
    if not dealt:
        return Plan(slots, [], Notes(0, 0))
    number_of = {slot: number for number, members in enumerate(dealt) for slot in members}
    notes = Notes(len(dealt), len(slots))
    noted = [0] * (len(dealt) - 1) + [notes.count]
    devices = [arrays.place_of_tensor(members[0].parameter)[0] for members in dealt]
    dtypes = [arrays.view(torch.empty(0, dtype=members[0].dtype, device="cpu")).dtype for members in dealt]
    wires = [wire_dtype(wire_of(layout.compression), dtype) for dtype in dtypes]
    counts = [[slot.shape.numel() for slot in members] for members in dealt]
    # Dtype, wire, elements and flags of each bucket.
    extents = [
        n
        for dtype, wire, count, more in zip(dtypes, wires, counts, noted, strict=True)
        for n in (int(dtype.value), int(wire.value), sum(count), len(count) + more)
    ]
    op = reduce_op(layout.op)
    dtype = _core.DType.float32
    wire = wire_dtype(wire_of(layout.compression), dtype)
    described = "".join(f"{_described(slot)} in bucket {number_of[slot]}\n" for slot in slots)
    name = f"{label}.plan{version}"
    device = "cpu" if all(at < 0 for at in devices) else "cuda"
    opening = (_core.Kind.channel, extents, dtype, wire, op, layout.prescale, layout.postscale, 0, device, described)
    # Buckets are on the device that all of them have their gradients on; where there are several they go by the host.
    place = arrays.place_of_tensor(dealt[0][0].parameter) if len(set(devices)) == 1 else (-1, 0)
    prepare(place[0])
    ticket = _run(engine, group, name, _core.Descriptor(*opening), place=place)
    if not ticket.on_device:  # what is compressed is cast before it leaves its device
        dtypes = [dtype if at < 0 else wire for dtype, wire, at in zip(dtypes, wires, devices, strict=True)]
    buckets = []
    for number, members in enumerate(dealt):
        core = _core.Bucket(
            engine=engine,
            group=group,
            name=f"{name}.bucket{number}",
            opened=ticket,
            number=number,
            dtype=dtypes[number],
            wire=wires[number],
            op=op,
            prescale=layout.prescale,
            postscale=layout.postscale,
            counts=counts[number],
            notes=noted[number],
            device=devices[number],
        )
        bucket = Bucket(members, core, getattr(torch, dtypes[number].name))
        buckets.append(bucket)
        in_memory = devices[number] < 0 or ticket.on_device
        viewable = in_memory and layout.may_view and wires[number] == dtypes[number]
        for i, slot in enumerate(members):
            slot.bucket = bucket
            if viewable and counts[number][i] > 0:
                slot.see(core, i)
    return Plan(slots, buckets, notes)


def _agreed_order(
    engine: _core.Engine, group: int, name: str, slots: Sequence[Slot], arrived: Sequence[Slot]
) -> list[Slot]:
    """All slots in the order in which their gradients came, in the mean over ranks; the last if they did not."""
    positions = np.full(len(slots), len(slots), dtype=np.int64)
    positions[[slot.number for slot in arrived]] = range(len(arrived))
    dtype = _core.DType.int64
    described = "".join(f"{_described(slot)}\n" for slot in slots)
    total = (_core.Kind.allreduce, positions.shape, dtype, dtype, _core.ReduceOp.Sum, 1.0, 1.0, 0, "cpu", described)
    _run(engine, group, name, _core.Descriptor(*total), positions)
    return [slots[number] for number in np.argsort(positions, kind="stable")]


def _run(
    engine: _core.Engine,
    group: int,
    name: str,
    what: _core.Descriptor,
    data: np.ndarray | None = None,
    place: tuple[int, int] = (-1, 0),
) -> _core.Ticket:
    """Run an operation, in place on `data`, and wait for it; place: the device that it is about, and its stream."""
    address = 0 if data is None else data.ctypes.data
    ticket = engine.submit(group, name, what, address, address, (), False, True, *place)
    Handle(engine, ticket, data, lambda _: None).wait()
    return ticket


def _described(slot: Slot) -> str:
    strides = "" if slot.strides == c_strides(slot.parameter) else f" strides {slot.strides}"
    device = "" if slot.device.type == "cpu" else f" on {slot.device.type}"
    return f"{slot.name} {str(slot.dtype).removeprefix('torch.')} {tuple(slot.shape)}{strides}{device}"
