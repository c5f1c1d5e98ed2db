"""A group of torch.distributed as far as it is none of its operations: who is in it, and how it submits to the engine.

c10d matches calls of a group by their order, and so does the engine in these groups (csrc/engine/order.h): nothing is
agreed on before a call runs. Groups are independent of each other, and made by their members alone.
"""

from __future__ import annotations

import itertools
import uuid
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import default_pg_timeout

from ... import arrays, devices, runtime, whereabouts
from ..._core import Descriptor, Kind, ReduceOp
from ...arrays import View
from ...config import timeout_is_set
from ...errors import InvalidArgumentError, ShutdownError, UnsupportedTypeError
from .callers import BACKEND
from .compiling import leave_alone
from .operators import is_defined, operator
from .places import Place, Tensors
from .work import Completed, Several, Work

__all__ = ["AnyWork", "GroupBase"]

# Untyped: what its stubs say of arguments and results differs between releases of torch.
_ProcessGroup: Any = dist.ProcessGroup
AnyWork = Work | Completed | Several


class GroupBase(_ProcessGroup):  # type: ignore[misc]
    """A group of ranks in torch.distributed; collective over them. See creation.py.

    Operations start in the order of the calls, which all ranks of the group make alike. Different shapes, types or
    operators raise a MismatchError, on all ranks. Tensors that are not contiguous are copied.

    Args:
        rank: this rank's number in the group.
        ranks: their numbers in the job, by their numbers in the group.
        name: torch's.
        label: what errors call it.
        timeout: of its operations.
    """

    def __init__(self, rank: int, ranks: list[int], name: str, label: str, timeout: timedelta) -> None:
        super().__init__(rank, len(ranks))  # the form that Python classes may use
        from mpi4py import MPI

        state = runtime.current()
        self._engine = state.engine
        self._rank, self._ranks, self._size = rank, ranks, len(ranks)
        self._name, self._description = name, "undefined"
        self._patience: timedelta | None = None
        # Torch's default counts only if the user has chosen nothing else.
        seconds = timeout.total_seconds()
        if timeout == default_pg_timeout and timeout_is_set():
            seconds = state.config.timeout
        # The tag tells groups apart that are made at a time. Not by their names, which torch gives each rank by itself.
        tag = zlib.crc32(repr(ranks).encode()) % 32768
        comm = state.comm.Create_group(state.comm.Get_group().Incl(ranks), tag)
        self._label = label
        identity = comm.bcast(uuid.uuid4().hex)  # groups of the same ranks have one label
        self._group = state.engine.add_ordered_group(MPI._handleof(comm), f"{self._label}: ", identity, seconds)
        comm.Free()  # the engine has duplicates
        self._calls = itertools.count(1)  # alike on all ranks
        self._pairs = itertools.count(1)
        self._described: dict[tuple[Any, ...], Descriptor] = {}
        self._coalescing: list[AnyWork] | None = None
        self._is_open = True

    # ---- what torch asks about a group ----

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    name = _get_backend_name = getBackendName

    def getSize(self) -> int:  # noqa: N802
        return self._size

    def getRank(self) -> int:  # noqa: N802
        return self._rank

    size, rank = getSize, getRank

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    _set_group_name = setGroupName

    @property
    def group_name(self) -> str:
        return self._name

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        self._description = description

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._description

    _set_group_desc = setGroupDesc

    @property
    def group_desc(self) -> str:
        return self._description

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu"), torch.device("cuda")]

    def _get_backend(self, device: torch.device) -> Any:
        return self

    @property
    def supports_coalescing(self) -> bool:
        return True

    @property
    def supports_splitting(self) -> bool:
        return False

    def set_timeout(self, timeout: timedelta) -> None:
        """Waits for operations of this group take at most so long from now on. The engine keeps its own limit."""
        self._patience = timeout

    _set_default_timeout = set_timeout

    def _has_hooks(self) -> bool:
        return False

    def shutdown(self) -> None:
        """No operation may follow; what is in flight ends first. Does not wait for the other ranks."""
        if self._is_open and runtime.is_initialized() and runtime.current().engine is self._engine:
            self._engine.dismiss_group(self._group)
        self._is_open = False

    abort = shutdown

    # ---- submitting ----

    def _where(self, kind: Kind) -> str:
        return f"rank {runtime.rank()}: {self._label}: {kind.name}"

    def _refuse(self, kind: Kind, text: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"{self._where(kind)}: {text}")

    def _descriptor(
        self,
        kind: Kind,
        v: View,
        count: int,
        op: ReduceOp = ReduceOp.Sum,
        scale: float = 1.0,
        root: int = 0,
        layout: str = "",
    ) -> Descriptor:
        """What ranks compare. Elements are counted, whatever their shape, as in c10d's other backends."""
        key = (kind, v.dtype, v.raw, v.device, count, op, scale, root, layout)
        known = self._described.get(key)
        if known is None:
            shape = (count, arrays.itemsize(v)) if v.raw else (count,)
            layout = "; ".join(text for text in (v.raw, layout) if text)
            known = Descriptor(kind, shape, v.dtype, v.dtype, op, scale, 1.0, root, v.device, layout)
            if len(self._described) >= 4096:
                self._described.clear()
            self._described[key] = known
        return known

    def _submit(
        self,
        what: Descriptor,
        kind: Kind,
        at: View | None,
        source: int,
        target: int,
        keep: Any,
        results: Tensors,
        after: Callable[[Any], None] | None = None,
        splits: Sequence[int] = (),
        rows: Sequence[int] = (),
        expected: Sequence[int] = (),
        timeout: timedelta | None = None,
        opts: Any = None,
    ) -> Work:
        if not self._is_open:
            raise ShutdownError(f"{self._where(kind)}: the group was destroyed")
        if runtime.current().config.check_call_sites:
            what = what.called_from(whereabouts.call_site())
        if at is not None:
            devices.prepare(at.ordinal)
        ticket = self._engine.submit_ordered(
            self._group,
            f"call {next(self._calls)}",
            what,
            source,
            target,
            splits,
            rows,
            expected,
            getattr(opts, "asyncOp", True) is False,  # then torch waits for it next
            -1 if at is None else at.ordinal,
            0 if at is None else at.stream,
        )
        return self._work(ticket, keep, results, after, timeout)

    def _work(
        self, ticket: Any, keep: Any, results: Tensors, after: Callable[[Any], None] | None, timeout: timedelta | None
    ) -> Work:
        work = Work(self._engine, ticket, keep, results, after, timeout or self._patience)
        if self._coalescing is not None:
            self._coalescing.append(work)
        return work

    def _start_coalescing(self, device: torch.device) -> None:
        """Operations start as they come; _end_coalescing() gives them out as one."""
        self._coalescing = []

    def _end_coalescing(self, device: torch.device) -> Several:
        works, self._coalescing = self._coalescing or [], None
        return Several(works)

    def _place(self, kind: Kind, tensor: torch.Tensor) -> Place:
        if not isinstance(tensor, torch.Tensor):
            raise self._refuse(kind, f"expected a tensor, got {type(tensor).__qualname__}")
        return Place(tensor, self._where(kind))

    def _only(self, kind: Kind, what: Any, name: str = "tensors") -> Any:
        if isinstance(what, torch.Tensor):
            return what
        if len(what) != 1:
            raise self._refuse(kind, f"takes one element in {name}, got {len(what)}")
        return what[0]

    def _root(self, kind: Kind, root: int) -> int:
        if not 0 <= root < self._size:
            raise self._refuse(kind, f"root rank {root} of a group of {self._size}")
        return root

    def _reduction(self, kind: Kind, v: View, op: Any) -> tuple[ReduceOp, float]:
        """The engine's operator, and the factor that comes before it; raises if they are not defined for the type."""
        known, factor = operator(op)
        if known is None:
            raise self._refuse(kind, f"the operator {op} is not supported")
        if not is_defined(known, factor, v):
            name = "a factor" if factor != 1.0 else known.name
            raise UnsupportedTypeError(f"{self._where(kind)}: {name} is not defined for {v.raw or v.dtype.name}")
        return known, factor

    # ---- checks ----

    def _one_each(self, kind: Kind, parts: Sequence[Any], which: str) -> None:
        if len(parts) != self._size:
            raise self._refuse(kind, f"takes an {which} for each of {self._size} ranks, got {len(parts)}")

    def _same_type(self, kind: Kind, a: torch.Tensor, b: torch.Tensor) -> None:
        if a.dtype != b.dtype or a.device != b.device:
            raise self._refuse(kind, f"tensors of {a.dtype} on {a.device} and of {b.dtype} on {b.device}")


leave_alone(GroupBase, Work, Completed, Several)
