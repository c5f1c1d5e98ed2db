"""c10d's operators and options."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ..._core import DType, ReduceOp
from ...arrays import View

__all__ = ["is_defined", "operator", "options_of"]

_FLOATS = (DType.float16, DType.bfloat16, DType.float32, DType.float64, DType.complex64, DType.complex128)
_INTEGERS = (DType.uint8, DType.int8, DType.uint16, DType.int16, DType.int32, DType.int64)
_BITWISE = (ReduceOp.BitAnd, ReduceOp.BitOr, ReduceOp.BitXor)

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


def operator(op: Any) -> tuple[ReduceOp | None, float]:
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


def is_defined(op: ReduceOp, factor: float, v: View) -> bool:
    """Whether the operator, and the factor before it, are for elements of this type."""
    if v.raw or (factor != 1.0 and v.dtype not in _FLOATS):
        return False
    if op in _BITWISE:
        return v.dtype in _INTEGERS or v.dtype == DType.bool
    if op in (ReduceOp.Min, ReduceOp.Max):
        return v.dtype not in (DType.complex64, DType.complex128)
    return not (op is ReduceOp.Average and v.dtype == DType.bool)


def options_of(kind: Any, op: Any = None, root: int | None = None) -> Any:
    """c10d's options, from what the shorter forms of its methods take."""
    options = kind()
    if op is not None:
        options.reduceOp = op
    if root is not None:
        options.rootRank = root
    return options
