"""Memory that the contenders reduce: the same bytes for each of them, so that none has better addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .job import has_torch
from .timing import Run

__all__ = ["DTYPES", "Buffer", "Slab", "cache_bytes", "check"]

DTYPES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
"""What --dtype takes, and the bytes per element."""

_PAGE = 4096
_DEFAULT_CACHE = 32 << 20


def cache_bytes() -> int:
    """The size of the last-level cache that core 0 uses, in bytes; 32 MiB if the system does not tell."""
    sizes = [_DEFAULT_CACHE]
    levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/level"), key=lambda p: p.read_text())
    if levels:
        text = (levels[-1].parent / "size").read_text().strip()
        sizes = [int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0)]
    return sizes[0]


@dataclass(frozen=True)
class Buffer:
    """A piece of memory, as each contender wants to see it."""

    dtype: str
    nbytes: int
    array: Any
    """Tensor if torch is installed, else NumPy array; of `dtype`, one-dimensional."""
    numeric: np.ndarray[Any, Any] | None
    """NumPy array of `dtype`; None for bfloat16, which NumPy lacks."""
    data: np.ndarray[Any, Any]
    """NumPy array of bytes."""
    spare: np.ndarray[Any, Any]
    """As many bytes elsewhere, for copies."""


class Slab:
    """One allocation, written to once, from which buffers are cut side by side, each on a page of its own.

    It holds zeros, which no number of sums changes.
    """

    def __init__(self, nbytes: int) -> None:
        self._memory = _pages(nbytes)
        self._spare = _pages(nbytes)

    def cut(self, dtype: str, nbytes: int) -> list[Buffer]:
        """All buffers of this size that fit, in order of address; at least one must."""
        stride = -(-nbytes // _PAGE) * _PAGE
        count = max(1, len(self._memory) // stride)
        return [self.at(dtype, nbytes, i * stride) for i in range(count)]

    def at(self, dtype: str, nbytes: int, offset: int) -> Buffer:
        """The buffer of `nbytes`, a multiple of the element's size, at `offset` bytes."""
        data = self._memory[offset : offset + nbytes]
        spare = self._spare[offset : offset + nbytes]
        numeric = None if dtype == "bfloat16" else data.view(dtype)
        array: Any = numeric
        if has_torch():
            import torch

            array = torch.from_numpy(data).view(getattr(torch, dtype))
        elif array is None:
            raise SystemExit("bfloat16 arrays need torch, which is not installed")
        return Buffer(dtype, nbytes, array, numeric, data, spare)


def _pages(nbytes: int) -> np.ndarray[Any, Any]:
    """Zeroed memory that begins on a page; written to, since untouched pages would all be the same one."""
    memory = np.empty(nbytes + _PAGE, np.uint8)
    memory.fill(0)
    skip = -memory.ctypes.data % _PAGE
    return memory[skip : skip + nbytes]


# Values whose sum over ranks differs from each of them and is exact in every dtype up to 6 ranks: 1 on rank 0, 2 on
# rank 1 and so on, and three times as much at every 61st element, so that a chunk in the wrong place shows.
_STRIDE = 61


def check(arrays: Sequence[Any], run: Run, rank: int, size: int, what: str) -> None:
    """Raise ArithmeticError unless two calls of `run` sum the arrays twice over all ranks; collective, zeroes them.

    Two calls, because the timed ones also follow each other with nothing in between: a second call that returned
    without having reduced would be the fastest of all.
    """
    for array in arrays:
        array[:] = rank + 1
        array[::_STRIDE] = 3 * (rank + 1)
    run(2)
    total = size * size * (size + 1) / 2
    tolerance = 0.0 if 3 * total <= 256 else 2.0**-7 * size  # bfloat16's, which may be rounded once per rank and call
    for array in arrays:
        array[::_STRIDE] -= 2 * total
        worst = float(abs(array - total).max())
        if not worst <= tolerance * total:
            raise ArithmeticError(f"{what}: two sums over {size} ranks are off by {worst:g} of {total:g}")
        array[:] = 0
