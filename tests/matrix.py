"""What the operations are tried with, and what must come out: array kinds, dtypes, operators, lengths, checks."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import collective
from collective import Average, Max, Min, Op, Product, Sum
from data import PERIOD, fill
from harness.plugin import World

INTEGERS = ("uint8", "int8", "uint16", "int16", "int32", "int64")
FLOATS = ("float16", "bfloat16", "float32", "float64")
COMPLEX = ("complex64", "complex128")
DTYPES = (*INTEGERS, *FLOATS, *COMPLEX, "bool")
# Bits of precision: rounding to nearest is off by 2^-bits of the value at most.
PRECISION = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53, "complex64": 24, "complex128": 53}

Values = npt.NDArray[Any]
Shape = int | tuple[int, ...]


def kinds(dtype: str) -> tuple[str, ...]:
    """The array kinds that have this dtype: numpy has no bfloat16 of its own."""
    return ("torch",) if dtype == "bfloat16" else ("numpy", "torch")


def operators(dtype: str) -> tuple[Op, ...]:
    """The operators that are defined for it."""
    if dtype in COMPLEX:
        return (Average, Sum, Product)
    return (Sum, Min, Max, Product) if dtype == "bool" else (Average, Sum, Min, Max, Product)


def combinations() -> Iterator[tuple[str, str, Op]]:
    """Every dtype x array kind x operator."""
    for dtype in DTYPES:
        for kind in kinds(dtype):
            for op in operators(dtype):
                yield dtype, kind, op


def lengths(size: int) -> list[int]:
    """Nothing, one, around the number of ranks, odd."""
    return sorted({0, 1, size - 1, size, size + 1, 33})


def itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _wide(dtype: str) -> str:
    """The numpy type in which every value of dtype is exact."""
    return "float64" if dtype in FLOATS else "int64" if dtype in INTEGERS else np.dtype(dtype).name


def values(op: Op | None, shape: Shape, dtype: str, rank: int, salt: int = 0) -> Values:
    """The numbers that a rank contributes, read-only; those for Product are of 1, 2, -1, -2.

    Past PERIOD they come again.
    """
    return _kept(_few_values, _many_values, shape, (op is Product, dtype, rank, salt))


def _kept(few: Callable[..., Values], many: Callable[..., Values], shape: Shape, what: tuple[Any, ...]) -> Values:
    """Numbers that follow from their index: few of them by shape, many as a piece of PERIOD, or as its repetition."""
    count = int(np.prod(shape))
    if count < 1000:
        return few(shape, *what)
    period = many(PERIOD, *what)
    return period[:count].reshape(shape) if count <= PERIOD else np.resize(period, shape)


def _values(shape: Shape, factors: bool, dtype: str, rank: int, salt: int) -> Values:
    result = fill(shape, "uint64" if dtype.startswith("uint") else _wide(dtype), rank, salt)
    if factors and dtype != "bool":
        sign = 1 if dtype.startswith("uint") else np.where(result.real > 0, 1, -1)
        result = sign * (1 + result.real % 2)
    if dtype in COMPLEX:
        result = result + 1j * (fill(shape, "int64", rank, salt + 101) % 3)
    result = np.asarray(result).astype(_wide(dtype))
    result.flags.writeable = False
    return result


_few_values = functools.lru_cache(maxsize=8192)(_values)
_many_values = functools.lru_cache(maxsize=64)(_values)


def make(numbers: Values, dtype: str, kind: str) -> Any:
    """A new array of this kind with these numbers."""
    if kind == "numpy":
        return numbers.astype(dtype)
    return torch.from_numpy(np.array(numbers)).to(getattr(torch, dtype))


def numbers(array: Any) -> Values:
    """The contents of an array of any kind, exactly."""
    if isinstance(array, torch.Tensor):
        array = (array.double() if array.dtype == torch.bfloat16 else array).numpy()
    return np.asarray(array).astype(_wide(array.dtype.name))


def scaled(x: Values, factor: float) -> Values:
    """x times a factor; integers are truncated toward zero."""
    return x if factor == 1 else np.trunc(x * factor).astype(x.dtype) if x.dtype.kind == "i" else x * factor


def reduced(
    op: Op,
    shape: Shape,
    dtype: str,
    size: int,
    salt: int = 0,
    prescale: float = 1.0,
    postscale: float = 1.0,
) -> Values:
    """What an allreduce of `values` over `size` ranks gives, before any rounding; read-only."""
    return _kept(_few_reduced, _many_reduced, shape, (op, dtype, size, salt, prescale, postscale))


def _reduced(shape: Shape, op: Op, dtype: str, size: int, salt: int, prescale: float, postscale: float) -> Values:
    each = np.stack([scaled(values(op, shape, dtype, rank, salt), prescale) for rank in range(size)])
    total: Values
    if op is Min or (op is Product and dtype == "bool"):
        total = each.min(0)
    elif op is Max or (op is Sum and dtype == "bool"):
        total = each.max(0)
    elif op is Product:
        total = each.prod(0)
    else:
        total = scaled(each.sum(0), 1 / size) if op is Average else each.sum(0)
    if dtype in INTEGERS:
        total = scaled(total.astype(dtype).astype("int64"), postscale)  # the operator wraps, the factor saturates
        total = np.clip(total, np.iinfo(dtype).min, np.iinfo(dtype).max)
    else:
        total = scaled(total, postscale)
    total = np.asarray(total)
    total.flags.writeable = False
    return total


_few_reduced = functools.lru_cache(maxsize=8192)(_reduced)
_many_reduced = functools.lru_cache(maxsize=64)(_reduced)


def rounding(op: Op, dtype: str, size: int) -> float:
    """How far an average of `values` may be off; everything else is exact."""
    if op is not Average or dtype not in PRECISION:
        return 0.0
    return 2 * 9 * (size + 1) * 2.0 ** -PRECISION[dtype]


def check(array: Any, expected: Values, tolerance: float | Values, *what: object) -> None:
    """Compare an array's shape and contents; a failure tells `what` and the first place that differs."""
    found = numbers(array)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    wrong = ~(np.abs(found - expected) <= tolerance) if found.dtype != bool else found != expected
    if wrong.any():
        at = tuple(int(i[0]) for i in np.nonzero(np.atleast_1d(wrong)))
        gave, wanted = np.atleast_1d(found)[at], np.atleast_1d(expected)[at]
        count = int(np.count_nonzero(wrong))
        raise AssertionError(f"{what}: {count} of {wrong.size} wrong, first at {at}: {gave}, expected {wanted}")


def digest(arrays: Iterable[Any]) -> str:
    """A hash of the bits of arrays."""
    result = hashlib.sha256()
    for array in arrays:
        if isinstance(array, torch.Tensor):
            array = (array.view(torch.int16) if array.dtype == torch.bfloat16 else array).numpy()
        result.update(array.tobytes())
    return result.hexdigest()


def same_on_all_ranks(world: World, arrays: Iterable[Any]) -> str:
    """Check that all ranks hold bitwise equal arrays; collective. Returns their digest."""
    digests = world.comm.allgather(digest(arrays))
    assert len(set(digests)) == 1, f"ranks hold different bits: {digests}"
    return digests[0]


@pytest.fixture(params=["memory", "messages"])
def transport(request: pytest.FixtureRequest, world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ranks of this node meet in shared memory, or send messages as those of several nodes do."""
    if request.param == "memory":
        yield
        return
    collective.shutdown()
    monkeypatch.setenv("COLLECTIVE_SHARED_MEMORY", "0")
    collective.init()
    yield
    collective.shutdown()
