"""Array kinds: the only place that tells NumPy, torch and CuPy apart.

Elsewhere an array is a `View`: address, shape, element type, device. A framework is not imported to recognise its
arrays: whoever has one has imported it. Other arrays are taken by the protocols that they support, DLPack or CUDA's
array interface; of these, the ones on a device need CuPy, which is then imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._core import DType, address_of
from .errors import UnsupportedTypeError

__all__ = [
    "View",
    "address_of_tensor",
    "changed",
    "contiguous",
    "copy",
    "current_streams",
    "device_bytes",
    "empty_like",
    "from_bytes",
    "itemsize",
    "place_of_tensor",
    "view",
]

_BY_NAME: dict[str, DType] = dict(DType.__members__)
_NUMPY_DTYPES: dict[np.dtype, DType] = {}  # filled as they are met
_TORCH_DTYPES: dict[Any, DType] = {}  # filled at the first tensor


@dataclass(slots=True)
class View:
    """What the engine needs to know about an array."""

    pointer: int
    shape: tuple[int, ...]
    dtype: DType
    device: str
    contiguous: bool
    array: Any  # the array itself, one that shares its memory, or for a Python scalar the 0-d array made from it
    ordinal: int = -1  # the device's number among CUDA_VISIBLE_DEVICES
    stream: int = 0  # the caller's stream, on which work on the array may be queued
    is_copy: bool = False
    raw: str = ""  # the name of an element type that the engine does not know: it moves as bytes, `dtype` is uint8


def _torch() -> Any:
    return sys.modules.get("torch")


def _is_tensor(x: Any) -> bool:
    torch = _torch()
    return torch is not None and isinstance(x, torch.Tensor)


def _is_cupy(x: Any) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def view(x: Any, moves_only: bool = False) -> View:
    """Look at an array; raises UnsupportedTypeError for what no collective can take.

    moves_only: elements are moved, not computed with, so any type of fixed size will do.
    """
    if isinstance(x, np.ndarray):
        return _view_numpy(x, moves_only)
    if _is_tensor(x):
        return _view_torch(x, moves_only)
    if isinstance(x, (bool, int, float, complex, np.generic)):
        v = _view_numpy(np.array(x), moves_only)
        v.is_copy = True
        return v
    if _is_cupy(x):
        return _view_cupy(x)
    if hasattr(x, "__cuda_array_interface__"):
        return _view_cupy(_cupy(x).asarray(x))
    if hasattr(x, "__dlpack__"):
        on_host = x.__dlpack_device__()[0] == 1  # DLPack's kDLCPU
        return _view_numpy(np.from_dlpack(x)) if on_host else _view_cupy(_cupy(x).from_dlpack(x))
    if isinstance(x, Exception):
        raise x  # from a caller that could not make the array
    raise UnsupportedTypeError(
        f"expected a numpy.ndarray, a torch.Tensor, a cupy.ndarray, another array with __cuda_array_interface__ or "
        f"__dlpack__, or a number, got {type(x).__qualname__}"
    )


def _cupy(x: Any) -> Any:
    """CuPy, for device arrays of other libraries: their results are CuPy's."""
    try:
        import cupy
    except ImportError as error:
        raise UnsupportedTypeError(
            f"a {type(x).__qualname__} on a device needs CuPy, which cannot be imported: {error}"
        ) from error
    return cupy


def _view_numpy(x: np.ndarray, moves_only: bool = False) -> View:
    dtype = _NUMPY_DTYPES.get(x.dtype)
    raw = ""
    if type(x) is not np.ndarray and isinstance(x, np.ma.MaskedArray):
        raise UnsupportedTypeError("a masked array would lose its mask: pass x.filled(value), or x.data and x.mask")
    if dtype is None:
        dtype = _BY_NAME.get(x.dtype.name)  # by name: bfloat16 comes from an extension such as ml_dtypes
        if dtype is not None and x.dtype.isnative:
            _NUMPY_DTYPES[x.dtype] = dtype
        elif moves_only and not x.dtype.hasobject and x.dtype.itemsize > 0:
            dtype, raw = DType.uint8, str(x.dtype)
        else:
            raise UnsupportedTypeError(
                f"dtype {x.dtype} of a numpy.ndarray is not supported; supported: {_supported()}"
            )
    return View(address_of(x), x.shape, dtype, "cpu", x.flags.c_contiguous, x, raw=raw)


def _view_cupy(x: Any) -> View:
    dtype = _BY_NAME.get(x.dtype.name)
    if dtype is None or not x.dtype.isnative:
        raise UnsupportedTypeError(f"dtype {x.dtype} of a cupy.ndarray is not supported; supported: {_supported()}")
    stream = sys.modules["cupy"].cuda.get_current_stream(x.device.id)
    return View(x.data.ptr, x.shape, dtype, "cuda", x.flags.c_contiguous, x, x.device.id, stream.ptr)


def _view_torch(x: Any, moves_only: bool = False) -> View:
    dtype = _TORCH_DTYPES.get(x.dtype)
    raw = ""
    if dtype is None:
        torch = _torch()
        _TORCH_DTYPES.update({getattr(torch, name): value for name, value in _BY_NAME.items() if hasattr(torch, name)})
        dtype = _TORCH_DTYPES.get(x.dtype)
        if dtype is None:
            if not moves_only or x.is_quantized:
                raise UnsupportedTypeError(
                    f"dtype {x.dtype} of a torch.Tensor is not supported; supported: {_supported()}"
                )
            dtype, raw = DType.uint8, str(x.dtype)
    pointer = address_of_tensor(x)
    contiguous = x.is_contiguous() and not x.is_conj() and not x.is_neg()
    if x.is_cpu:
        return View(pointer, tuple(x.shape), dtype, "cpu", contiguous, x, raw=raw)
    ordinal, stream = place_of_tensor(x)
    return View(pointer, tuple(x.shape), dtype, "cuda", contiguous, x, ordinal, stream, raw=raw)


def address_of_tensor(x: Any) -> int:
    """The address of a dense tensor's elements; raises UnsupportedTypeError if it has no memory of its own."""
    try:
        pointer: int = x.data_ptr()
    except RuntimeError:  # sparse, or within torch.func's transforms
        pointer = 0
    is_nested = x.is_nested
    if pointer and not is_nested:
        return pointer
    if is_nested or x.layout is not _torch().strided:
        layout = "nested" if is_nested else x.layout
        raise UnsupportedTypeError(f"a torch.Tensor of layout {layout}: only strided tensors are supported")
    if x.is_meta:
        place_of_tensor(x)  # raises the error that says so
    # Wrapper subclasses have elements but no memory: 0 would be taken for a missing tensor.
    if x.numel() > 0:
        raise UnsupportedTypeError(
            f"a {type(x).__qualname__} has no memory of its own that could be read: pass the tensors that it is made "
            f"of (for a DTensor x.to_local())"
        )
    return 0


def changed(v: View) -> None:
    """Tell the framework that the array's elements are being overwritten, as its own in-place operations do."""
    if _is_tensor(v.array):
        _torch().autograd.graph.increment_version(v.array)


def place_of_tensor(x: Any) -> tuple[int, int]:
    """Where a tensor is: the number of its device and the current stream there; (-1, 0) for the host."""
    if x.is_cpu:
        return -1, 0
    if not x.is_cuda or _torch().version.hip is not None:
        raise UnsupportedTypeError(f"a tensor on device {x.device}: only CPU and CUDA tensors are supported")
    return x.device.index, _torch().cuda.current_stream(x.device).cuda_stream


def current_streams(ordinals: Iterable[int]) -> list[tuple[int, int]]:
    """The streams of these devices on which the frameworks currently queue the caller's work."""
    streams = []
    torch, cupy = _torch(), sys.modules.get("cupy")
    for ordinal in ordinals:
        if torch is not None and torch.cuda.is_available():
            streams.append((ordinal, torch.cuda.current_stream(ordinal).cuda_stream))
        if cupy is not None:
            streams.append((ordinal, cupy.cuda.get_current_stream(ordinal).ptr))
    return streams


def device_bytes(pointer: int, nbytes: int, owner: object, device: Any) -> Any:
    """A uint8 torch tensor over device memory, which it keeps alive through its owner."""
    return _torch().as_tensor(_DeviceBytes(pointer, nbytes, owner), device=device)


class _DeviceBytes:
    def __init__(self, pointer: int, nbytes: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (pointer, False), "version": 3}


def _supported() -> str:
    return ", ".join(_BY_NAME)


def contiguous(v: View) -> View:
    """The view itself, or one of a C-contiguous copy."""
    if v.contiguous:
        return v
    if _is_tensor(v.array):
        return _view_torch(v.array.detach().resolve_conj().resolve_neg().contiguous(), True)
    if _is_cupy(v.array):
        with v.array.device:
            return _view_cupy(sys.modules["cupy"].ascontiguousarray(v.array))
    return _view_numpy(np.ascontiguousarray(v.array), True)


def empty_like(v: View, shape: tuple[int, ...] | None = None) -> View:
    """A new C-contiguous array of the same kind and dtype, and of the same shape unless another is given."""
    shape = v.shape if shape is None else shape
    if _is_tensor(v.array):
        torch = _torch()
        return _view_torch(torch.empty(shape, dtype=v.array.dtype, device=v.array.device), True)
    if _is_cupy(v.array):
        with v.array.device:
            return _view_cupy(sys.modules["cupy"].empty(shape, dtype=v.array.dtype))
    return _view_numpy(np.empty(shape, dtype=v.array.dtype), True)


def copy(v: View) -> View:
    """A C-contiguous copy."""
    if _is_tensor(v.array):
        torch = _torch()
        source = v.array.detach()
        return _view_torch(source.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format), True)
    if _is_cupy(v.array):
        with v.array.device:
            return _view_cupy(v.array.copy(order="C"))
    return _view_numpy(v.array.copy(order="C"), True)


def from_bytes(data: np.ndarray, shape: tuple[int, ...], like: View) -> Any:
    """An array of the same kind, dtype and device as `like`, sharing the uint8 array's memory on the host."""
    if _is_tensor(like.array):
        torch = _torch()
        if data.size == 0:  # there is no memory to view
            return torch.empty(shape, dtype=like.array.dtype, device=like.array.device)
        return torch.from_numpy(data).view(like.array.dtype).reshape(shape).to(like.array.device)
    if _is_cupy(like.array):
        cupy = sys.modules["cupy"]
        with like.array.device:
            result = cupy.asarray(data.view(like.array.dtype).reshape(shape))
            cupy.cuda.get_current_stream(like.ordinal).synchronize()  # so that other streams may use it
            return result
    return data.view(like.array.dtype).reshape(shape)


def itemsize(v: View) -> int:
    """Bytes per element."""
    size = v.array.itemsize
    return int(size() if callable(size) else size)
