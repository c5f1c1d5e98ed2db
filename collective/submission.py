"""What all operations share: names, process sets, checks of arguments, and the hand-over to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Literal

import numpy as np

from . import arrays, runtime
from ._core import Descriptor, DType, Kind, ReduceOp, Ticket
from .arrays import View
from .errors import InvalidArgumentError, UnsupportedTypeError
from .handles import Handle
from .process_sets import ProcessSet

__all__ = ["Average", "Call", "Compression", "Max", "Min", "Op", "Product", "Sum"]

Compression = Literal["fp16", "bf16"]


class Op(IntEnum):
    """Reduction operators, with Horovod's numbers."""

    Average = 0
    Sum = 1
    Adasum = 2
    Min = 3
    Max = 4
    Product = 5


Average, Sum, Adasum, Min, Max, Product = Op.Average, Op.Sum, Op.Adasum, Op.Min, Op.Max, Op.Product

_CORE_OPS: dict[Op, ReduceOp] = {op: getattr(ReduceOp, op.name) for op in Op}
_WIRE = {"fp16": DType.float16, "bf16": DType.bfloat16}
_COMPRESSIBLE = (DType.float32, DType.float64)
_COMPLEX = (DType.complex64, DType.complex128)
_FLOATS = (DType.float16, DType.bfloat16, DType.float32, DType.float64)


def checked_op(op: Any) -> Op:
    """The operator for what a caller gave; raises InvalidArgumentError."""
    try:
        return Op(op)
    except ValueError:
        raise InvalidArgumentError(f"rank {runtime.rank()}: op {op!r} is none of {', '.join(Op.__members__)}") from None


def reduce_op(op: Op) -> ReduceOp:
    """The engine's operator."""
    return _CORE_OPS[op]


def wire_dtype(compression: str | None, dtype: DType) -> DType:
    """The type in which elements of `dtype` travel."""
    if compression is None:
        return dtype
    if compression not in _WIRE:
        raise InvalidArgumentError(
            f"rank {runtime.rank()}: compression {compression!r} is none of None, {', '.join(map(repr, _WIRE))}"
        )
    return _WIRE[compression] if dtype in _COMPRESSIBLE else dtype


class Call:
    """One call of an operation on this rank: where it runs, under which name, and how errors speak of it."""

    def __init__(self, kind: Kind, name: str | None, process_set: ProcessSet, caller_waits: bool) -> None:
        self.state = runtime.current()
        self.kind = kind
        self.name = name
        self.process_set = process_set
        self.caller_waits = caller_waits
        group = process_set.group
        if group is None:
            raise InvalidArgumentError(f"{self.where}: this rank is not in {process_set}")
        self.group: int = group

    @property
    def where(self) -> str:
        """How an error names the call."""
        return f"rank {runtime.rank()}: {self.kind.name} {repr(self.name) if self.name else '(unnamed)'}"

    @property
    def full_name(self) -> str:
        """The name under which ranks meet."""
        return self.name or self.state.name_for(self.kind.name, self.group)

    def root(self, root_rank: Any) -> int:
        """The root's number within the process set; `root_rank` counts over all ranks, as in Horovod."""
        if isinstance(root_rank, (int, np.integer)) and not isinstance(root_rank, bool):
            ranks = self.process_set.ranks
            if int(root_rank) in ranks:
                return ranks.index(int(root_rank))
        raise InvalidArgumentError(f"{self.where}: root_rank {root_rank!r} is no rank of {self.process_set}")

    def view(self, x: Any) -> View:
        try:
            return arrays.view(x)
        except UnsupportedTypeError as error:
            raise UnsupportedTypeError(f"{self.where}: {error}") from None

    def factor(self, what: str, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise InvalidArgumentError(f"{self.where}: {what} {value!r} is no number") from None

    def wire(self, compression: str | None, dtype: DType) -> DType:
        try:
            return wire_dtype(compression, dtype)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{self.where}: {error}") from None

    def in_place(self, x: Any) -> View:
        """The view of an array that the operation may overwrite."""
        try:
            v = arrays.view(x)
        except UnsupportedTypeError as error:
            raise UnsupportedTypeError(f"{self.where}, in place: {error}") from None
        if v.array is not x:
            raise UnsupportedTypeError(f"{self.where}: a {type(x).__qualname__} cannot be changed in place")
        if not v.contiguous:
            raise InvalidArgumentError(f"{self.where}: in place needs a contiguous array; make a copy first")
        if isinstance(x, np.ndarray) and not x.flags.writeable:
            raise InvalidArgumentError(f"{self.where}: in place needs a writeable array")
        return v

    def rows_view(self, x: Any) -> View:
        """A contiguous view with at least one dimension: a scalar counts as one row."""
        v = arrays.contiguous(self.view(x))
        if not v.shape:
            v.shape = (1,)
        return v

    def op_for(self, op: Any, dtype: DType, prescale: float, postscale: float) -> Op:
        """The operator, checked against what it is to reduce."""
        try:
            checked = checked_op(op)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{self.where}: {error}") from None
        undefined = (
            (dtype == DType.bool and checked is Average)
            or (dtype in _COMPLEX and checked in (Min, Max))
            or (checked is Adasum and dtype not in _FLOATS)
        )
        if undefined:
            raise UnsupportedTypeError(f"{self.where}: op {checked.name} is not defined for {dtype.name}")
        if dtype == DType.bool and not prescale == postscale == 1.0:
            raise UnsupportedTypeError(f"{self.where}: factors are not defined for bool")
        return checked

    def submit(
        self,
        shown: View | None,
        source: View | None,
        target: View | None,
        *,
        op: Op = Sum,
        wire: DType | None = None,
        prescale: float = 1.0,
        postscale: float = 1.0,
        root: int = 0,
        splits: Sequence[int] = (),
    ) -> Ticket:
        """Hand the operation to the engine. `shown`: the array whose shape and dtype the ranks agree on."""
        return self.state.engine.submit(
            self.group,
            self.full_name,
            self.describe(shown, op, wire, prescale, postscale, root),
            source.pointer if source else 0,
            target.pointer if target else 0,
            splits,
            self.name is not None,
            self.caller_waits,
        )

    def describe(
        self,
        shown: View | None,
        op: Op = Sum,
        wire: DType | None = None,
        prescale: float = 1.0,
        postscale: float = 1.0,
        root: int = 0,
    ) -> Descriptor:
        """What the ranks compare."""
        dtype = shown.dtype if shown else DType.uint8
        return Descriptor(
            self.kind,
            shown.shape if shown else (),
            dtype,
            wire or dtype,
            _CORE_OPS[op],
            prescale,
            postscale,
            root,
            shown.device if shown else "cpu",
            "",
        )

    def handle(self, ticket: Ticket, keep: Any, result: Any) -> Handle[Any]:
        """The caller's end; `result` makes the return value of the finished ticket."""
        return Handle(self.state.engine, ticket, keep, result)
