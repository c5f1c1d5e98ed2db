"""What all operations share: names, process sets, checks of arguments, and the hand-over to the engine."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any, Literal

import numpy as np

from . import arrays, devices, runtime, whereabouts
from ._core import Descriptor, DType, Kind, ReduceOp, Ticket
from .arrays import View
from .errors import CollectiveError, InvalidArgumentError, UnsupportedTypeError
from .handles import Handle, Handles
from .process_sets import ProcessSet

__all__ = ["Adasum", "Average", "Call", "Compression", "Max", "Min", "Op", "Product", "Sum", "grouped"]

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
# Compared by identity: looking for one of the engine's enumerators in a tuple takes 0.8 us, this 0.1.
_ALLREDUCE, _REDUCE, _REDUCESCATTER = Kind.allreduce, Kind.reduce, Kind.reducescatter
_COMPLEX = (DType.complex64, DType.complex128)
# Descriptors by the arguments that they were made from, see Call.reduction().
_reductions: dict[tuple[Any, ...], Descriptor] = {}
_MOST_REDUCTIONS = 4096

_FLOATS = (DType.float16, DType.bfloat16, DType.float32, DType.float64)


def checked_op(op: Any) -> Op:
    """The operator for what a caller gave; raises InvalidArgumentError."""
    if isinstance(op, Exception):
        raise op  # from a caller that could not tell which one is meant, see torch/ops.py
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
    """One call of an operation on this rank: where it runs, under which name, and how errors refer to it.

    A context manager: what is raised within it before the operation is submitted is reported to the other ranks if the
    call has no name to tell it apart by. Their calls then fail, too, and later calls stay paired. So a call counts on
    all ranks, whether or not its arguments are accepted.
    """

    def __init__(self, kind: Kind, name: str | None, process_set: ProcessSet, caller_waits: bool) -> None:
        self.state = runtime.current()
        self.kind = kind
        self.name = name if isinstance(name, str) else self._checked_name(name)
        self.caller_waits = caller_waits
        self._submitted = False
        self._full_name: str | None = None
        if not isinstance(process_set, ProcessSet):
            raise InvalidArgumentError(
                f"{self.where}: process_set is a ProcessSet, such as global_process_set, not {process_set!r}"
            )
        self.process_set = process_set
        group = process_set.group
        if group is None:
            raise InvalidArgumentError(f"{self.where}: this rank is not in {process_set}")
        self.group: int = group

    def __enter__(self) -> Call:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or self._submitted or self.name or not isinstance(error, Exception):
            return
        with contextlib.suppress(CollectiveError):  # the engine has stopped, as all ranks are told
            self.refuse(error)

    def refuse(self, error: Exception) -> Handle[Any]:
        """Take part with an error in place of the operation: all ranks raise a MismatchError that reports it."""
        text = f"rank {runtime.rank()} rejected its own call: {type(error).__name__}: {error}"
        refusal = Descriptor(Kind.refusal, (), DType.uint8, DType.uint8, ReduceOp.Sum, 1.0, 1.0, 0, "cpu", text)
        ticket = self.state.engine.submit(self.group, self.full_name, refusal, 0, 0, (), False, False)
        return self.handle(ticket, None, lambda _: None)

    @staticmethod
    def _checked_name(name: Any) -> str | None:
        """Numbers will do as names, as they do for Horovod's users."""
        if name is None or isinstance(name, (int, np.integer)):
            return None if name is None else str(name)
        raise InvalidArgumentError(f"rank {runtime.rank()}: name {name!r} is a {type(name).__qualname__}, not a str")

    @property
    def where(self) -> str:
        """How an error names the call."""
        return f"rank {runtime.rank()}: {self.kind.name} {repr(self.name) if self.name else '(unnamed)'}"

    @property
    def full_name(self) -> str:
        """The name by which ranks match the call; an unnamed call is given a number, once."""
        if self._full_name is None:
            self._full_name = self.name or self.state.name_for(self.kind.name, self.group)
        return self._full_name

    def root(self, root_rank: Any) -> int:
        """The root's number within the process set; `root_rank` is numbered among all ranks, as in Horovod."""
        if isinstance(root_rank, (int, np.integer)) and not isinstance(root_rank, bool):
            ranks = self.process_set.ranks
            if int(root_rank) in ranks:
                return ranks.index(int(root_rank))
        raise InvalidArgumentError(f"{self.where}: root_rank {root_rank!r} is not a rank of {self.process_set}")

    @property
    def _moves_only(self) -> bool:
        kind = self.kind
        return not (kind is _ALLREDUCE or kind is _REDUCE or kind is _REDUCESCATTER)

    def view(self, x: Any) -> View:
        try:
            return arrays.view(x, self._moves_only)
        except UnsupportedTypeError as error:
            raise UnsupportedTypeError(f"{self.where}: {error}") from None

    def in_place(self, x: Any) -> View:
        """The view of an array that the operation may overwrite."""
        try:
            v = arrays.view(x, self._moves_only)
        except UnsupportedTypeError as error:
            raise UnsupportedTypeError(f"{self.where}, in place: {error}") from None
        if v.is_copy:
            raise UnsupportedTypeError(f"{self.where}: a {type(x).__qualname__} cannot be changed in place")
        if not v.contiguous:
            raise InvalidArgumentError(f"{self.where}: in place needs a contiguous array; make a copy first")
        if isinstance(v.array, np.ndarray) and not v.array.flags.writeable:
            raise InvalidArgumentError(f"{self.where}: in place needs a writeable array")
        arrays.changed(v)
        return v

    def rows_view(self, x: Any) -> View:
        """A contiguous view with at least one dimension: a scalar counts as one row."""
        v = arrays.contiguous(self.view(x))
        if not v.shape:
            v.shape = (1,)
        return v

    def reduction(
        self, v: View, op: Any, prescale: Any, postscale: Any, compression: str | None, root: int = 0
    ) -> Descriptor:
        """What the ranks compare in a reduction of `v`; raises if the arguments are wrong on this rank."""
        if type(prescale) is not float or type(postscale) is not float:  # the number in an array may change
            prescale = self._factor("prescale_factor", prescale)
            postscale = self._factor("postscale_factor", postscale)
        # The same calls come again and again: looking one up costs a fifth of checking and describing it.
        key = (self.kind.value, v.shape, v.dtype.value, v.device, op, prescale, postscale, compression, root)
        try:
            known = _reductions.get(key)
        except TypeError:  # an argument that cannot be hashed is wrong
            return self._new_reduction(v, op, prescale, postscale, compression, root)
        if known is None:
            known = self._new_reduction(v, op, prescale, postscale, compression, root)
            if len(_reductions) >= _MOST_REDUCTIONS:
                _reductions.clear()
            _reductions[key] = known
        return known

    def _new_reduction(
        self, v: View, op: Any, prescale: float, postscale: float, compression: str | None, root: int
    ) -> Descriptor:
        factors = (prescale, postscale)
        try:
            checked, wire = checked_op(op), wire_dtype(compression, v.dtype)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{self.where}: {error}") from None
        undefined = (
            (v.dtype == DType.bool and checked is Average)
            or (v.dtype in _COMPLEX and checked in (Min, Max))
            or (checked is Adasum and v.dtype not in _FLOATS)
        )
        if undefined:
            raise UnsupportedTypeError(f"{self.where}: op {checked.name} is not defined for {v.dtype.name}")
        if v.dtype == DType.bool and factors != (1.0, 1.0):
            raise UnsupportedTypeError(f"{self.where}: factors are not defined for bool")
        if v.dtype not in (*_FLOATS, *_COMPLEX, DType.bool):
            for what, factor in zip(("prescale_factor", "postscale_factor"), factors, strict=True):
                if not math.isfinite(factor):
                    raise InvalidArgumentError(f"{self.where}: {what} {factor} is not defined for {v.dtype.name}")
        return Descriptor(self.kind, v.shape, v.dtype, wire, _CORE_OPS[checked], *factors, root, v.device, "")

    def _factor(self, what: str, value: Any) -> float:
        try:
            if isinstance(value, (str, bytes, bytearray)):  # float() would parse them
                raise TypeError
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise InvalidArgumentError(f"{self.where}: {what} {value!r} is not a number") from None

    def movement(self, v: View | None, root: int = 0) -> Descriptor:
        """What the ranks compare in an operation that moves `v` as it is."""
        if v is None:
            return Descriptor(self.kind, (), DType.uint8, DType.uint8, ReduceOp.Sum, 1.0, 1.0, root, "cpu", "")
        shape = (*v.shape, arrays.itemsize(v)) if v.raw else v.shape
        return Descriptor(self.kind, shape, v.dtype, v.dtype, ReduceOp.Sum, 1.0, 1.0, root, v.device, v.raw)

    def submit(self, what: Descriptor, source: View | None, target: View | None, splits: Sequence[int] = ()) -> Ticket:
        """Hand the operation to the engine."""
        if self.state.config.check_call_sites:
            what = what.called_from(whereabouts.call_site())
        at = source or target
        if at:
            devices.prepare(at.ordinal)
        ticket = self.state.engine.submit(
            self.group,
            self.full_name,
            what,
            source.pointer if source else 0,
            target.pointer if target else 0,
            splits,
            self.name is not None,
            self.caller_waits,
            at.ordinal if at else -1,
            at.stream if at else 0,
        )
        self._submitted = True
        return ticket

    def handle(self, ticket: Ticket, keep: Any, result: Any) -> Handle[Any]:
        """The caller's handle; `result` makes the return value from the finished ticket."""
        return Handle(self.state.engine, ticket, keep, result)


def grouped(start: Callable[[Any, str | None], Handle[Any]], xs: Iterable[Any], name: Any) -> Handles[Any]:
    """Several calls as one: `start` is given each array and its name.

    If one of them is refused on this rank, the others are submitted all the same: other ranks wait for them, and later
    calls must match their own.
    """
    members: list[Handle[Any]] = []
    refused: Exception | None = None
    for number, x in enumerate(xs):
        try:
            members.append(start(x, None if name is None else f"{name}.{number}"))
        except Exception as error:
            refused = refused or error
    if refused is not None:
        raise refused
    return Handles(members)
