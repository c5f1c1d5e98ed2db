"""The process group of torch.distributed: c10d's operations as submissions to the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ... import devices
from ..._core import PAIR_TAGS, Descriptor, DType, Kind, ReduceOp
from ...errors import ShutdownError, UnsupportedTypeError
from .base import AnyWork, GroupBase
from .compiling import leave_alone
from .operators import operator, options_of
from .places import Place, Tensors, as_one, deal, rows_text, side_by_side, store_from_host
from .work import Completed, Several, Work

__all__ = ["ProcessGroup"]

_ANY = -1  # for a receive


class ProcessGroup(GroupBase):
    """A group of ranks in torch.distributed; collective over them. See creation.py."""

    # ---- reductions ----

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> AnyWork:
        opts = opts if hasattr(opts, "reduceOp") else options_of(dist.AllreduceOptions, opts)
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
        opts = opts if hasattr(opts, "reduceOp") else options_of(dist.AllreduceOptions, opts)
        return _joined([self.allreduce([tensor], opts) for tensor in tensors])

    def _allreduce_sparse(self, tensor: torch.Tensor, opts: Any) -> Completed:
        """The sum of sparse tensors: of the elements of all, gathered. Done when it returns."""
        if operator(opts.reduceOp) != (ReduceOp.Sum, 1.0):
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
        opts = opts if hasattr(opts, "rootRank") else options_of(dist.ReduceOptions, more[0] if more else None, opts)
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
        opts = opts if hasattr(opts, "reduceOp") else options_of(dist.ReduceScatterOptions, opts)
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
        what = self._descriptor(kind, v, own.numel(), op, factor, layout=rows_text(rows))
        after = None if target.copy is None else lambda _: target.store()
        places = (source, target)
        return self._submit(
            what, kind, v, v.pointer, target.view.pointer, places, [output], after, rows=rows, opts=opts
        )

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, *more: Any) -> Work:
        kind = Kind.reducescatter
        opts = opts if hasattr(opts, "reduceOp") else options_of(dist.ReduceScatterOptions, opts)
        output = self._only(kind, outputs, "the output list")
        parts = inputs if isinstance(inputs[0], torch.Tensor) else self._only(kind, inputs, "the input list")
        self._one_each(kind, parts, "input")
        rows = [part.numel() for part in parts]
        if output.numel() != rows[self._rank]:
            raise self._refuse(kind, f"the output has {output.numel()} elements, this rank's input {rows[self._rank]}")
        uneven = rows if len(set(rows)) > 1 else ()
        return self._scatter_sums(output, side_by_side(parts), opts, uneven)

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
        what = self._descriptor(kind, v, rows[self._rank], root=root, layout=rows_text(rows))
        if not parts:
            return self._submit(what, kind, v, v.pointer, 0, source, [], rows=rows, opts=opts)
        whole = as_one(parts)
        if v.ordinal >= 0:  # the engine gathers on the host, see csrc/engine/staging.h
            return self._submit(
                what,
                kind,
                v,
                v.pointer,
                0,
                source,
                parts,
                lambda ticket: store_from_host(ticket, parts, own),
                rows=rows,
            )
        flat = whole if whole is not None else own.new_empty(sum(rows))
        after = None if whole is not None else lambda _: deal(flat, parts)
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
            flat = side_by_side(parts)
        elif any(len(part) > 0 for part in inputs or []):
            raise self._refuse(kind, f"inputs belong to the root, rank {root} of the group")
        total = output.numel() * self._size
        what = self._descriptor(kind, v, total, root=root, layout=f"{output.numel()} elements for each rank")
        source = 0 if flat is None else flat.data_ptr()
        rows = [total] * self._size
        if v.ordinal >= 0:
            spread = partial(store_from_host, parts=[output], like=output)
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
        whole = as_one(outputs)
        received = [part.numel() for part in outputs]
        flat = whole if whole is not None else outputs[0].new_empty(sum(received))
        source, target = self._place(kind, side_by_side(inputs)), self._place(kind, flat)
        after = None if whole is not None else lambda _: deal(flat, outputs)
        return self._exchange(source, target, [part.numel() for part in inputs], received, outputs, after, opts)

    def _exchange(
        self,
        source: Place,
        target: Place,
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
            after = _in_turn(lambda ticket: store_from_host(ticket, [target.array], target.array), after)
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


leave_alone(ProcessGroup)


def _joined(works: list[AnyWork]) -> AnyWork:
    return works[0] if len(works) == 1 else Several(works)


def _in_turn(first: Callable[[Any], None], second: Callable[[Any], None] | None) -> Callable[[Any], None]:
    def both(ticket: Any) -> None:
        first(ticket)
        if second is not None:
            second(ticket)

    return both
