"""Array kinds: the one place that knows NumPy from torch.

Elsewhere an array is a `View`: address, shape, element type, device. Frameworks are never imported here; an array of
a framework means that its user has imported it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._core import DType, address_of
from .errors import UnsupportedTypeError

__all__ = ["View", "contiguous", "copy", "empty_like", "from_bytes", "itemsize", "view"]

_BY_NAME: dict[str, DType] = dict(DType.__members__)
_NUMPY_DTYPES: dict[np.dtype, DType] = {}  # filled as they come
_TORCH_DTYPES: dict[Any, DType] = {}  # filled at the first tensor


@dataclass(slots=True)
class View:
    """What the engine needs to know of an array."""

    pointer: int
    shape: tuple[int, ...]
    dtype: DType
    device: str
    contiguous: bool
    array: Any  # the array itself, or for a Python scalar the 0-d array made of it


def _torch() -> Any:
    return sys.modules.get("torch")


def _is_tensor(x: Any) -> bool:
    torch = _torch()
    return torch is not None and isinstance(x, torch.Tensor)


def view(x: Any) -> View:
    """Look at an array; raises UnsupportedTypeError for what no collective can take."""
    if isinstance(x, np.ndarray):
        return _view_numpy(x)
    if _is_tensor(x):
        return _view_torch(x)
    if isinstance(x, (bool, int, float, complex, np.generic)):
        return _view_numpy(np.array(x))
    raise UnsupportedTypeError(f"expected a numpy.ndarray, a torch.Tensor or a number, got {type(x).__qualname__}")


def _view_numpy(x: np.ndarray) -> View:
    dtype = _NUMPY_DTYPES.get(x.dtype)
    if dtype is None:
        dtype = _BY_NAME.get(x.dtype.name)  # by name: bfloat16 comes from an extension such as ml_dtypes
        if dtype is None or not x.dtype.isnative:
            raise UnsupportedTypeError(
                f"dtype {x.dtype} of a numpy.ndarray is not supported; supported: {_supported()}"
            )
        _NUMPY_DTYPES[x.dtype] = dtype
    return View(address_of(x), x.shape, dtype, "cpu", x.flags.c_contiguous, x)


def _view_torch(x: Any) -> View:
    dtype = _TORCH_DTYPES.get(x.dtype)
    if dtype is None:
        torch = _torch()
        _TORCH_DTYPES.update({getattr(torch, name): value for name, value in _BY_NAME.items() if hasattr(torch, name)})
        dtype = _TORCH_DTYPES.get(x.dtype)
        if dtype is None:
            raise UnsupportedTypeError(f"dtype {x.dtype} of a torch.Tensor is not supported; supported: {_supported()}")
    if not x.is_cpu:
        raise UnsupportedTypeError(f"a tensor on device {x.device}: only CPU tensors are supported")
    if x.layout is not _torch().strided:
        raise UnsupportedTypeError(f"a torch.Tensor of layout {x.layout}: only strided tensors are supported")
    contiguous = x.is_contiguous() and not x.is_conj() and not x.is_neg()
    return View(x.data_ptr(), tuple(x.shape), dtype, "cpu", contiguous, x)


def _supported() -> str:
    return ", ".join(_BY_NAME)


def contiguous(v: View) -> View:
    """The view itself, or that of a C-contiguous copy."""
    if v.contiguous:
        return v
    if _is_tensor(v.array):
        return _view_torch(v.array.detach().resolve_conj().resolve_neg().contiguous())
    return _view_numpy(np.ascontiguousarray(v.array))


def empty_like(v: View, shape: tuple[int, ...] | None = None) -> View:
    """A new C-contiguous array of the same kind and dtype, and of the same shape unless another is given."""
    shape = v.shape if shape is None else shape
    if _is_tensor(v.array):
        torch = _torch()
        return _view_torch(torch.empty(shape, dtype=v.array.dtype, device=v.array.device))
    return _view_numpy(np.empty(shape, dtype=v.array.dtype))


def copy(v: View) -> View:
    """A C-contiguous copy."""
    if _is_tensor(v.array):
        torch = _torch()
        source = v.array.detach()
        return _view_torch(source.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format))
    return _view_numpy(v.array.copy(order="C"))


def from_bytes(data: np.ndarray, shape: tuple[int, ...], like: View) -> Any:
    """An array of the same kind and dtype as `like` over the memory of a uint8 array, which it owns."""
    if _is_tensor(like.array):
        torch = _torch()
        if data.size == 0:  # has no memory to view
            return torch.empty(shape, dtype=like.array.dtype)
        return torch.from_numpy(data).view(like.array.dtype).reshape(shape)
    return data.view(like.array.dtype).reshape(shape)


def itemsize(v: View) -> int:
    """Bytes of an element."""
    size = v.array.itemsize
    return int(size() if callable(size) else size)
