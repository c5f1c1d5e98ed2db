"""Which parameters share a bucket, and what a bucket knows about them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .. import _core, arrays
from ..handles import Handle

__all__ = ["Bucket", "Groups", "Named", "Notes", "Slot", "c_strides", "deal", "dense_strides"]

Named = tuple[str, torch.nn.Parameter]
Groups = int | list[list[torch.nn.Parameter]] | None

# At most this many bytes in the bucket that is ready first and in the one that is ready last: communication starts
# early, and little is left after backward, when nothing hides it. Time added to a ResNet-50 step, as in views.py:
# 256 KiB, 1 MiB and 2 MiB 11 to 15 ms; 4 MiB 16 to 17.
EDGE = 1 << 20

# A model is cut into about this many buckets, though not into buckets below EDGE: of a small model in one or two
# buckets, nothing could be sent before backward is almost done.
MOST_PARTS = 8


_storage_use_count = getattr(torch._C, "_storage_Use_Count", None)


@dataclass(eq=False)
class Slot:
    """A parameter's place."""

    number: int  # among all
    name: str
    parameter: torch.nn.Parameter
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]  # of its elements in the bucket
    device: torch.device
    bucket: Bucket | None = None  # once the plan is open
    view: torch.Tensor | None = None  # of its elements in the bucket, if the gradient may be that
    place: int = 0  # their address there
    # The gradient that the view has replaced, until the next one comes: if all were released at once, their memory
    # would go back to the system, and page faults would cost the next backward more than the copies that views save
    # (ResNet-50: 13,000 to 17,000 faults a step, 25 ms, against 2,200).
    retired: torch.Tensor | None = None
    holders: tuple[int, int] = (0, 0)  # of the view and of its memory, while only the slot holds them
    passes: int = 0  # backward passes in this round
    ready: bool = False
    was_sparse: bool = False  # the gradient of this round, before it was made dense

    def see(self, core: _core.Bucket, number: int) -> None:
        """Make `view` one of the bucket's tensor of this number."""
        if arrays.place_of_tensor(self.parameter)[0] < 0:
            place = torch.from_numpy(core.place(number))
        else:
            place = arrays.device_bytes(*core.device_place(number), self.device)
        # With a storage of its own, so that saving one gradient saves no others.
        self.view = torch.empty(0, dtype=self.dtype, device=self.device).set_(
            place.untyped_storage(), 0, self.shape, self.strides
        )
        self.place = self.view.data_ptr()
        del place
        self.holders = self._count_holders()

    def _count_holders(self) -> tuple[int, int]:
        """How many Python references there are to the view, and how many to its memory in other ways: by other tensors
        and arrays, their storage, DLPack, what autograd has saved. Counted alike each time: only differences matter.

        0 where torch does not tell (it does so through private functions).
        """
        assert self.view is not None
        storage = self.view.untyped_storage()
        shared = 0 if _storage_use_count is None else _storage_use_count(storage._cdata)
        in_cpp = self.view._use_count() if hasattr(self.view, "_use_count") else 0
        return sys.getrefcount(self.view), shared + sys.getrefcount(storage) + in_cpp

    def let_go(self, core: _core.Bucket, number: int) -> bool:
        """Before the place is written to: leave the view to a script that has kept it, with memory of its own.

        As a rule none has, and this costs half a microsecond. False: the memory is held in another way, and cannot be
        moved. The view then counts as changed, and is no longer the slot's.
        """
        if self.view is None:
            return True
        if self.view.data_ptr() != self.place:  # `grad.data = x` has taken it elsewhere
            self.see(core, number)
            return True
        references, others = self._count_holders()
        if others > self.holders[1]:
            torch.autograd.graph.increment_version(self.view)
            self.view = None
            return False
        if references > self.holders[0]:
            self._move()
            self.see(core, number)
        return True

    def take_out(self) -> bool:
        """The gradient is the view, and must survive while the place is written to: give it memory of its own.

        It stays the same tensor, unless its memory is held in another way: then it is another, and this returns False.
        """
        self.parameter.grad = None  # not to be counted
        is_alone = self._count_holders()[1] <= self.holders[1]
        assert self.view is not None
        if is_alone:
            self._move()
            self.parameter.grad = self.view
        else:
            self.parameter.grad = self.view.clone()
            torch.autograd.graph.increment_version(self.view)
        self.view = None
        return is_alone

    def _move(self) -> None:
        assert self.view is not None
        own = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        self.view.data = own.copy_(self.view.detach())

    def holds(self, grad: torch.Tensor | None) -> bool:
        """Whether `grad` is the view and still lies in the bucket: `grad.data = x` moves a tensor elsewhere."""
        return (
            grad is not None
            and grad is self.view
            and grad.data_ptr() == self.place
            and grad.dtype == self.dtype
            and grad.shape == self.shape
            and grad.stride() == self.strides
        )


@dataclass(eq=False)
class Bucket:
    slots: list[Slot]
    core: _core.Bucket
    dtype: torch.dtype  # of what the engine takes and returns: on a device, compressed gradients are cast there
    waiting: int = 0  # slots that are not ready
    run: Handle[None] | None = None  # of this round
    streams: set[torch.cuda.Stream] = field(default_factory=set)  # on which gradients on a device were computed
    # What the run was given: gradient, its version and its address, by slot.
    given: list[tuple[torch.Tensor | None, int, int]] = field(default_factory=list)


class Notes:
    """The numbers of the notes that ranks send each other in the last bucket of a round."""

    def __init__(self, buckets: int, slots: int) -> None:
        self.stale = range(buckets)  # the bucket's gradients have changed since it started
        self.in_place = range(buckets, buckets + slots)  # the gradient was a view of its bucket, so it is gone
        self.sparse = range(buckets + slots, buckets + 2 * slots)  # the gradient is sparse
        self.changed = buckets + 2 * slots  # the parameters have changed
        self.refused = self.changed + 1  # a gradient cannot travel
        self.spoiled = self.refused + 1  # the parameters have changed, and gradients in place are gone
        self.count = self.spoiled + 1


def c_strides(p: torch.Tensor) -> tuple[int, ...]:
    """The strides of C order."""
    strides = []
    elements = 1
    for extent in reversed(p.shape):
        strides.append(elements)
        elements *= max(extent, 1)
    return tuple(reversed(strides))


def dense_strides(p: torch.Tensor) -> tuple[int, ...]:
    """The strides in which p's elements fill memory without gaps: its own where they do, else C order."""
    if p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last):
        return tuple(p.stride())
    if p.dim() == 5 and p.is_contiguous(memory_format=torch.channels_last_3d):
        return tuple(p.stride())
    return c_strides(p)


def deal(slots: Sequence[Slot], groups: Groups, limit: int) -> list[list[Slot]]:
    """The members of each bucket, in the order in which buckets will be ready.

    Args:
        slots: in the order in which their gradients come.
        groups: how many buckets to make of them, or which parameters share one; the rest is cut by size.
        limit: at most this many bytes in a bucket, unless a single parameter takes more.
    """
    if not slots:
        return []
    chosen: list[list[Slot]] = []
    rest = list(slots)
    if isinstance(groups, int) and groups > 0:
        size = -(-len(rest) // groups)
        chosen = [bucket for first in range(0, len(rest), size) for bucket in _by_kind(rest[first : first + size])]
        rest = []
    elif isinstance(groups, list):
        group_of = {p: number for number, group in enumerate(groups) for p in group}
        parts: list[list[Slot]] = [[] for _ in groups]
        for slot in rest:
            if slot.parameter in group_of:
                parts[group_of[slot.parameter]].append(slot)
        chosen = [bucket for part in parts for bucket in _by_kind(part)]
        rest = [slot for slot in rest if slot.parameter not in group_of]
    for part in _by_kind(rest):
        chosen += _cut(part, min(limit, max(EDGE, sum(map(_nbytes, part)) // MOST_PARTS)))
    arrival = {slot: number for number, slot in enumerate(slots)}
    return sorted(chosen, key=lambda bucket: max(arrival[slot] for slot in bucket))


def _by_kind(slots: Sequence[Slot]) -> list[list[Slot]]:
    """Split by dtype and device, in the order of first appearance."""
    parts: dict[tuple[torch.dtype, torch.device], list[Slot]] = {}
    for slot in slots:
        parts.setdefault((slot.dtype, slot.device), []).append(slot)
    return list(parts.values())


def _cut(slots: list[Slot], limit: int) -> list[list[Slot]]:
    """Cut into pieces of up to `limit` bytes, the first and the last smaller."""
    edge = min(limit, EDGE)
    first_of_last = len(slots) - 1
    used = _nbytes(slots[-1])
    while first_of_last > 0 and used + _nbytes(slots[first_of_last - 1]) <= edge:
        first_of_last -= 1
        used += _nbytes(slots[first_of_last])
    buckets: list[list[Slot]] = []
    used = 0
    for slot in slots[:first_of_last]:
        most = edge if len(buckets) == 1 else limit
        if not buckets or used + _nbytes(slot) > most:
            buckets.append([])
            used = 0
        buckets[-1].append(slot)
        used += _nbytes(slot)
    return [*buckets, slots[first_of_last:]]


def _nbytes(slot: Slot) -> int:
    return slot.shape.numel() * slot.dtype.itemsize
