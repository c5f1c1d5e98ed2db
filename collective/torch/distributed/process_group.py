"""The process group of torch.distributed: c10d's operations as submissions to the engine.

c10d matches calls of a group by their order, and so does the engine in these groups (csrc/engine/order.h): nothing is
agreed on before a call runs. Groups are independent of each other, and made by their members alone.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import default_pg_timeout

from ... import arrays, devices, runtime
from ..._core import PAIR_TAGS, Descriptor, DType, Kind, ReduceOp
from ...arrays import View
from ...config import timeout_is_set
from ...errors import InvalidArgumentError, ShutdownError, UnsupportedTypeError
from .compiling import leave_alone
from .work import Completed, Several, Work

__all__ = ["ProcessGroup"]

_ANY = -1  # for a receive
_FLOATS = (DType.float16, DType.bfloat16, DType.float32, DType.float64, DType.complex64, DType.complex128)
_INTEGERS = (DType.uint8, DType.int8, DType.uint16, DType.int16, DType.int32, DType.int64)
_BITWISE = (ReduceOp.BitAnd, ReduceOp.BitOr, ReduceOp.BitXor)

Tensors = list[torch.Tensor]
# Untyped: what its stubs say of arguments and results differs between releases of torch.
_ProcessGroup: Any = dist.ProcessGroup
AnyWork = Work | Completed | Several


class _Place:
    """A tensor as the engine sees it: its view, and what has to be copied back."""

    __slots__ = ("copy", "tensor", "view")

    def __init__(self, tensor: torch.Tensor, where: str) -> None:
        self.tensor = tensor
        try:
            self.view = arrays.view(tensor, True)
        except UnsupportedTypeError as error:
            raise UnsupportedTypeError(f"{where}: {error}") from None
        self.copy = None
        if not self.view.contiguous:
            self.copy = tensor.contiguous().resolve_conj().resolve_neg()
            self.view = arrays.view(self.copy, True)

    @property
    def array(self) -> torch.Tensor:
        """What the engine reads and writes."""
        return self.tensor if self.copy is None else self.copy

    def store(self) -> None:
        """Copy the result to where the caller wants it."""
        if self.copy is not None:
            self.tensor.copy_(self.copy)


class ProcessGroup(_ProcessGroup):  # type: ignore[misc]
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
        self._group = state.engine.add_ordered_group(MPI._handleof(comm), f"{self._label}: ", seconds)
        comm.Free()  # the engine has duplicates
        self._calls = itertools.count(1)  # alike on all ranks
        self._pairs = itertools.count(1)
        self._described: dict[tuple[Any, ...], Descriptor] = {}
        self._coalescing: list[AnyWork] | None = None
        self._is_open = True

    # ---- what torch asks about a group ----

    def getBackendName(self) -> str:  # noqa: N802
        return "collective"

    def name(self) -> str:
        return "collective"

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

    def _get_backend(self, device: torch.device) -> ProcessGroup:
        return self

    def _get_backend_name(self) -> str:
        return "collective"

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

    def _place(self, kind: Kind, tensor: torch.Tensor) -> _Place:
        if not isinstance(tensor, torch.Tensor):
            raise self._refuse(kind, f"expected a tensor, got {type(tensor).__qualname__}")
        return _Place(tensor, self._where(kind))

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
        known, factor = _operator(op)
        if known is None:
            raise self._refuse(kind, f"the operator {op} is not supported")
        undefined = (
            v.raw
            or (v.dtype == DType.bool and known is ReduceOp.Average)
            or (known in _BITWISE and v.dtype not in (*_INTEGERS, DType.bool))
            or (known in (ReduceOp.Min, ReduceOp.Max) and v.dtype in (DType.complex64, DType.complex128))
            or (factor != 1.0 and v.dtype not in _FLOATS)
        )
        if undefined:
            name = "a factor" if factor != 1.0 else known.name
            raise UnsupportedTypeError(f"{self._where(kind)}: {name} is not defined for {v.raw or v.dtype.name}")
        return known, factor

    # ---- reductions ----

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> AnyWork:
        opts = opts if hasattr(opts, "reduceOp") else _options(dist.AllreduceOptions, opts)
        tensor = self._only(Kind.allreduce, tensors)
        if tensor.layout is torch.sparse_coo:
            return self._allreduce_sparse(tensor, opts)
        place = self._place(Kind.allreduce, tensor)
        v = place.view
        op, factor = self._reduction(Kind.allreduce, v, opts.reduceOp)
        what = self._descriptor(Kind.allreduce, v, tensor.numel(), op, factor)
        after = None if place.copy is None else lambda _: place.store()
        return self._submit(
            what, Kind.allreduce, v, v.pointer, v.pointer, place, [tensor], after, timeout=timeout, opts=opts
        )

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> AnyWork:
        opts = opts if hasattr(opts, "reduceOp") else _options(dist.AllreduceOptions, opts)
        return _joined([self.allreduce([tensor], opts) for tensor in tensors])

    def _allreduce_sparse(self, tensor: torch.Tensor, opts: Any) -> Completed:
        """The sum of sparse tensors: of the elements of all, gathered. Done when it returns."""
        if _operator(opts.reduceOp) != (ReduceOp.Sum, 1.0):
            raise self._refuse(Kind.allreduce, "of sparse tensors only the sum is supported")
        own = tensor.coalesce()
        counts = torch.empty(self._size, dtype=torch.int64)
        self._allgather_base(counts, torch.tensor([own._nnz()])).wait()
        indices = self._gathered(own.indices().t().contiguous(), counts.tolist())
        values = self._gathered(own.values().contiguous(), counts.tolist())
        total = torch.sparse_coo_tensor(indices.t(), values, tensor.shape, check_invariants=False).coalesce()
        tensor.copy_(total)
        return Completed([tensor])

    def _gathered(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """The rows of all ranks, one after the other."""
        parts = [rows.new_empty((count, *rows.shape[1:])) for count in counts]
        self.allgather([parts], [rows]).wait()
        return torch.cat(parts)

    def reduce(self, tensors: Any, opts: Any = None, *more: Any) -> Work:
        opts = opts if hasattr(opts, "rootRank") else _options(dist.ReduceOptions, more[0] if more else None, opts)
        tensor = self._only(Kind.reduce, tensors)
        root = self._root(Kind.reduce, opts.rootRank)
        place = self._place(Kind.reduce, tensor)
        v = place.view
        op, factor = self._reduction(Kind.reduce, v, opts.reduceOp)
        what = self._descriptor(Kind.reduce, v, tensor.numel(), op, factor, root)
        is_root = root == self._rank
        after = (lambda _: place.store()) if is_root and place.copy is not None else None
        return self._submit(
            what, Kind.reduce, v, v.pointer, v.pointer if is_root else 0, place, [tensor], after, opts=opts
        )

    def _reduce_scatter_base(self, output: torch.Tensor, own: torch.Tensor, opts: Any = None) -> Work:
        kind = Kind.reducescatter
        opts = opts if hasattr(opts, "reduceOp") else _options(dist.ReduceScatterOptions, opts)
        if own.numel() != output.numel() * self._size:
            raise self._refuse(
                kind, f"the input has {own.numel()} elements, and {self._size} outputs {output.numel()} each"
            )
        return self._scatter_sums(output, own, opts, ())

    reduce_scatter_single = _reduce_scatter_base

    def _scatter_sums(self, output: torch.Tensor, own: torch.Tensor, opts: Any, rows: Sequence[int]) -> Work:
        """rows: elements for each rank; none where they are equal."""
        kind = Kind.reducescatter
        self._same_type(kind, output, own)
        source, target = self._place(kind, own), self._place(kind, output)
        v = source.view
        op, factor = self._reduction(kind, v, opts.reduceOp)
        if rows and v.ordinal >= 0:
            raise UnsupportedTypeError(f"{self._where(kind)}: parts of different length of tensors on a device")
        what = self._descriptor(kind, v, own.numel(), op, factor, layout=_rows_text(rows))
        after = None if target.copy is None else lambda _: target.store()
        places = (source, target)
        return self._submit(
            what, kind, v, v.pointer, target.view.pointer, places, [output], after, rows=rows, opts=opts
        )

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, *more: Any) -> Work:
        kind = Kind.reducescatter
        opts = opts if hasattr(opts, "reduceOp") else _options(dist.ReduceScatterOptions, opts)
        output = self._only(kind, outputs, "the output list")
        parts = inputs if isinstance(inputs[0], torch.Tensor) else self._only(kind, inputs, "the input list")
        self._one_each(kind, parts, "input")
        rows = [part.numel() for part in parts]
        if output.numel() != rows[self._rank]:
            raise self._refuse(kind, f"the output has {output.numel()} elements, this rank's input {rows[self._rank]}")
        uneven = rows if len(set(rows)) > 1 else ()
        return self._scatter_sums(output, _flat(parts), opts, uneven)

    def reduce_scatter_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> AnyWork:
        pairs = zip(outputs, inputs, strict=True)
        return _joined([self._reduce_scatter_base(output, own, opts) for output, own in pairs])

    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    # ---- movement ----

    def broadcast(self, tensors: Any, opts: Any = None, *more: Any) -> AnyWork:
        kind = Kind.broadcast
        root = self._root(kind, opts.rootRank if hasattr(opts, "rootRank") else opts or 0)
        works: list[AnyWork] = []
        for tensor in [tensors] if isinstance(tensors, torch.Tensor) else tensors:
            place = self._place(kind, tensor)
            v = place.view
            what = self._descriptor(kind, v, tensor.numel(), root=root)
            after = None if place.copy is None or root == self._rank else (lambda _, place=place: place.store())
            works.append(self._submit(what, kind, v, v.pointer, v.pointer, place, [tensor], after, opts=opts))
        return _joined(works)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, *more: Any) -> Work:
        kind = Kind.allgather
        own = self._only(kind, inputs)
        parts = outputs if isinstance(outputs[0], torch.Tensor) else self._only(kind, outputs, "the output list")
        self._one_each(kind, parts, "output")
        rows = [part.numel() for part in parts]
        if rows[self._rank] != own.numel():
            raise self._refuse(kind, f"the input has {own.numel()} elements, its output {rows[self._rank]}")
        for part in parts:
            self._same_type(kind, part, own)
        return self._gather(kind, own, parts, rows, opts)

    def _allgather_base(self, output: torch.Tensor, own: torch.Tensor, opts: Any = None) -> Work:
        kind = Kind.allgather
        if output.numel() != own.numel() * self._size:
            raise self._refuse(
                kind, f"the output has {output.numel()} elements, and {self._size} inputs {own.numel()} each"
            )
        self._same_type(kind, output, own)
        return self._gather(kind, own, [output], [own.numel()] * self._size, opts)

    all_gather_single = _allgather_base

    def allgather_coalesced(self, output_lists: Any, inputs: Tensors, opts: Any = None) -> AnyWork:
        # c10d's order: a list of tensors for each rank.
        return _joined(
            [self.allgather([[out[i] for out in output_lists]], [tensor]) for i, tensor in enumerate(inputs)]
        )

    def allgather_into_tensor_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> AnyWork:
        pairs = zip(outputs, inputs, strict=True)
        return _joined([self._allgather_base(output, own) for output, own in pairs])

    all_gather_single_coalesced = allgather_into_tensor_coalesced

    def gather(self, outputs: Any, inputs: Any, opts: Any = None, *more: Any) -> Work:
        kind = Kind.gather
        own = self._only(kind, inputs)
        root = self._root(kind, opts.rootRank if hasattr(opts, "rootRank") else opts or 0)
        parts: Tensors = []
        if root == self._rank:
            parts = outputs if isinstance(outputs[0], torch.Tensor) else self._only(kind, outputs, "the output list")
            self._one_each(kind, parts, "output")
            for part in parts:
                self._same_type(kind, part, own)
                if part.numel() != own.numel():
                    raise self._refuse(kind, f"an output has {part.numel()} elements, the input {own.numel()}")
        elif any(len(part) > 0 for part in outputs or []):
            raise self._refuse(kind, f"outputs belong to the root, rank {root} of the group")
        return self._gather(kind, own, parts, [own.numel()] * self._size, opts, root)

    def _gather(self, kind: Kind, own: torch.Tensor, parts: Tensors, rows: list[int], opts: Any, root: int = 0) -> Work:
        """All ranks' elements, side by side in `parts`; no parts on a rank that gets nothing. rows: of each rank."""
        source = self._place(kind, own)
        v = source.view
        what = self._descriptor(kind, v, rows[self._rank], root=root, layout=_rows_text(rows))
        if not parts:
            return self._submit(what, kind, v, v.pointer, 0, source, [], rows=rows, opts=opts)
        whole = _whole(parts)
        if v.ordinal >= 0:  # the engine gathers on the host, see csrc/engine/staging.h
            return self._submit(
                what, kind, v, v.pointer, 0, source, parts, lambda ticket: _spread(ticket, parts, own), rows=rows
            )
        flat = whole if whole is not None else own.new_empty(sum(rows))
        after = None if whole is not None else lambda _: _deal(flat, parts)
        return self._submit(
            what, kind, v, v.pointer, flat.data_ptr(), (source, flat), parts, after, rows=rows, opts=opts
        )

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None, *more: Any) -> Work:
        kind = Kind.scatter
        output = self._only(kind, outputs)
        root = self._root(kind, opts.rootRank if hasattr(opts, "rootRank") else opts or 0)
        target = self._place(kind, output)
        v = target.view
        flat = None
        if root == self._rank:
            parts = inputs if isinstance(inputs[0], torch.Tensor) else self._only(kind, inputs, "the input list")
            self._one_each(kind, parts, "input")
            for part in parts:
                self._same_type(kind, part, output)
                if part.numel() != output.numel():
                    raise self._refuse(kind, f"an input has {part.numel()} elements, the output {output.numel()}")
            flat = _flat(parts)
        elif any(len(part) > 0 for part in inputs or []):
            raise self._refuse(kind, f"inputs belong to the root, rank {root} of the group")
        total = output.numel() * self._size
        what = self._descriptor(kind, v, total, root=root, layout=f"{output.numel()} elements for each rank")
        source = 0 if flat is None else flat.data_ptr()
        rows = [total] * self._size
        if v.ordinal >= 0:
            spread = partial(_spread, parts=[output], like=output)
            return self._submit(what, kind, v, source, 0, (target, flat), [output], spread, rows=rows, opts=opts)
        after = None if target.copy is None else lambda _: target.store()
        return self._submit(what, kind, v, source, v.pointer, (target, flat), [output], after, rows=rows, opts=opts)

    def alltoall_base(
        self,
        output: torch.Tensor,
        own: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = None,
        *more: Any,
    ) -> Work:
        kind = Kind.alltoall
        self._same_type(kind, output, own)
        sent = self._splits(kind, "input", own, input_splits)
        received = self._splits(kind, "output", output, output_splits)
        source, target = self._place(kind, own), self._place(kind, output)
        after = None if target.copy is None else lambda _: target.store()
        return self._exchange(source, target, sent, received, [output], after, opts)

    all_to_all_single = alltoall_base

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None, *more: Any) -> Work:
        kind = Kind.alltoall
        self._one_each(kind, inputs, "input")
        self._one_each(kind, outputs, "output")
        for tensor in (*inputs, *outputs):
            self._same_type(kind, tensor, inputs[0])
        whole = _whole(outputs)
        received = [part.numel() for part in outputs]
        flat = whole if whole is not None else outputs[0].new_empty(sum(received))
        source, target = self._place(kind, _flat(inputs)), self._place(kind, flat)
        after = None if whole is not None else lambda _: _deal(flat, outputs)
        return self._exchange(source, target, [part.numel() for part in inputs], received, outputs, after, opts)

    def _exchange(
        self,
        source: _Place,
        target: _Place,
        sent: list[int],
        received: list[int],
        results: Tensors,
        after: Callable[[Any], None] | None,
        opts: Any,
    ) -> Work:
        kind = Kind.alltoall
        v = source.view
        what = self._descriptor(kind, v, sum(sent))
        pointer = target.view.pointer
        if v.ordinal >= 0:  # what the engine exchanges arrives on the host, see csrc/engine/staging.h
            pointer = 0
            after = _in_turn(lambda ticket: _spread(ticket, [target.array], target.array), after)
        return self._submit(
            what,
            kind,
            v,
            v.pointer,
            pointer,
            (source, target),
            results,
            after,
            splits=sent,
            expected=received,
            opts=opts,
        )

    def _splits(self, kind: Kind, which: str, tensor: torch.Tensor, splits: Sequence[int]) -> list[int]:
        """Elements for each rank, of rows for each rank."""
        rows = tensor.shape[0] if tensor.dim() else 1
        if not splits:
            if rows % self._size:
                raise self._refuse(kind, f"{rows} rows of the {which} do not divide among {self._size} ranks")
            return [tensor.numel() // self._size] * self._size
        if len(splits) != self._size or sum(splits) != rows or min(splits) < 0:
            raise self._refuse(
                kind, f"{which} splits {list(splits)} do not divide {rows} rows among {self._size} ranks"
            )
        each = tensor.numel() // rows if rows else 0
        return [split * each for split in splits]

    def barrier(self, opts: Any = None, *more: Any) -> Work:
        what = Descriptor(Kind.barrier, (), DType.uint8, DType.uint8, ReduceOp.Sum, 1.0, 1.0, 0, "cpu", "")
        return self._submit(what, Kind.barrier, None, 0, 0, None, [], opts=opts)

    # ---- between two ranks ----

    def send(self, tensors: Any, peer: int, tag: int = 0) -> Work:
        return self._pair(self._only(Kind.pair, tensors), True, peer, tag)

    def recv(self, tensors: Any, peer: int, tag: int = 0) -> Work:
        return self._pair(self._only(Kind.pair, tensors), False, peer, tag)

    def recv_anysource(self, tensors: Any, tag: int = 0) -> Work:
        return self._pair(self._only(Kind.pair, tensors), False, _ANY, tag)

    def _pair(self, tensor: torch.Tensor, sends: bool, peer: int, tag: int) -> Work:
        kind = Kind.pair
        if not self._is_open:
            raise ShutdownError(f"{self._where(kind)}: the group was destroyed")
        if peer != _ANY and (not 0 <= peer < self._size or peer == self._rank):
            raise self._refuse(kind, f"rank {peer} of a group of {self._size} is no other rank")
        if not 0 <= tag < PAIR_TAGS:
            raise self._refuse(kind, f"tag {tag} is not from 0 to {PAIR_TAGS - 1}")
        place = self._place(kind, tensor)
        v = place.view
        devices.prepare(v.ordinal)
        what = self._descriptor(kind, v, tensor.numel())
        ticket = self._engine.submit_pair(
            self._group,
            f"{'send' if sends else 'receive'} {next(self._pairs)}",
            what,
            sends,
            peer,
            tag,
            v.pointer,
            False,
            v.ordinal,
            v.stream,
        )
        after = None if sends or place.copy is None else lambda _: place.store()
        return self._work(ticket, place, [tensor], after, None)

    # ---- checks ----

    def _one_each(self, kind: Kind, parts: Sequence[Any], which: str) -> None:
        if len(parts) != self._size:
            raise self._refuse(kind, f"takes an {which} for each of {self._size} ranks, got {len(parts)}")

    def _same_type(self, kind: Kind, a: torch.Tensor, b: torch.Tensor) -> None:
        if a.dtype != b.dtype or a.device != b.device:
            raise self._refuse(kind, f"tensors of {a.dtype} on {a.device} and of {b.dtype} on {b.device}")


leave_alone(ProcessGroup, Work, Completed, Several)


def _options(kind: Any, op: Any = None, root: int | None = None) -> Any:
    """c10d's options, from what the shorter forms of its methods take."""
    options = kind()
    if op is not None:
        options.reduceOp = op
    if root is not None:
        options.rootRank = root
    return options


def _joined(works: list[AnyWork]) -> AnyWork:
    return works[0] if len(works) == 1 else Several(works)


_OPERATORS: dict[str, ReduceOp] = {
    "SUM": ReduceOp.Sum,
    "AVG": ReduceOp.Average,
    "PRODUCT": ReduceOp.Product,
    "MIN": ReduceOp.Min,
    "MAX": ReduceOp.Max,
    "BAND": ReduceOp.BitAnd,
    "BOR": ReduceOp.BitOr,
    "BXOR": ReduceOp.BitXor,
}


def _operator(op: Any) -> tuple[ReduceOp | None, float]:
    """The engine's operator and the factor before it, for one of c10d's."""
    if op == dist.ReduceOp.PREMUL_SUM:
        return ReduceOp.Sum, float(_factor(op))
    for name, known in _OPERATORS.items():
        if op == getattr(dist.ReduceOp, name):
            return known, 1.0
    return None, 1.0


def _factor(op: Any) -> Any:
    """What a PREMUL_SUM multiplies by: an attribute in torch 2.13, before in its pickled state alone."""
    return op.factor if hasattr(op, "factor") else op.__getstate__()[1]


def _rows_text(rows: Sequence[int]) -> str:
    """What ranks compare of the elements of each rank."""
    if len(set(rows)) <= 1:
        return f"{rows[0]} elements of each rank" if rows else ""
    text = f"elements by rank {', '.join(map(str, rows))}"
    return text if len(text) < 1000 else f"elements by rank, with checksum {zlib.crc32(text.encode())}"


def _in_turn(first: Callable[[Any], None], second: Callable[[Any], None] | None) -> Callable[[Any], None]:
    def both(ticket: Any) -> None:
        first(ticket)
        if second is not None:
            second(ticket)

    return both


def _whole(parts: Tensors) -> torch.Tensor | None:
    """The memory of tensors that follow each other without a gap, as one; None where they do not."""
    at = parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != at or not part.is_contiguous() or part.is_conj() or part.is_neg():
            return None
        at += part.numel() * part.itemsize
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if any(part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for part in parts):
        return None
    return first.as_strided((sum(part.numel() for part in parts),), (1,))


def _flat(parts: Tensors) -> torch.Tensor:
    """The elements of all, side by side; a copy unless they are so already."""
    whole = _whole(parts)
    return whole if whole is not None else torch.cat([part.reshape(-1) for part in parts])


def _deal(flat: torch.Tensor, parts: Tensors) -> None:
    """Give each tensor its elements."""
    at = 0
    for part in parts:
        part.copy_(flat[at : at + part.numel()].view(part.shape))
        at += part.numel()


def _spread(ticket: Any, parts: Tensors, like: torch.Tensor) -> None:
    """Give tensors on a device what the engine has gathered on the host."""
    nbytes = sum(part.numel() * part.itemsize for part in parts)
    _deal(torch.from_numpy(ticket.take_output(nbytes)).view(like.dtype), parts)
