"""A stand-in for CuPy over the stand-in for its driver (tests/csrc/stand_in_cuda.cc): what this package uses of CuPy,
and what its tests do to arrays. Work on arrays is queued on the current stream and takes its time."""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import nvrtc

__version__ = "0"

_driver = ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    result = getattr(_driver, name)(*arguments)
    if result != 0:
        raise RuntimeError(f"{name}: {result}")


class _Memory:
    def __init__(self, nbytes: int, device: int) -> None:
        address = ctypes.c_size_t()
        self.device = device
        with cuda.Device(device):
            _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(nbytes, 1)))
        self.ptr = address.value

    owner: Any = None  # somebody else

    def __del__(self) -> None:
        if self.owner is not None:
            return
        with contextlib.suppress(AttributeError, TypeError), cuda.Device(self.device):  # when the interpreter ends
            _call("cuMemFree_v2", ctypes.c_size_t(self.ptr))


class _Device:
    def __init__(self, number: int) -> None:
        self.id = number

    def __enter__(self) -> _Device:
        _call("cuCtxPushCurrent_v2", ctypes.c_void_p(self.id + 1))
        _current_devices.append(self.id)
        return self

    def __exit__(self, *exception: object) -> None:
        _current_devices.pop()
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


class _Stream:
    def __init__(self, ptr: int | None = None) -> None:
        self.device = _current_devices[-1]
        if ptr is None:
            handle = ctypes.c_void_p()
            with cuda.Device(self.device):
                _call("cuStreamCreate", ctypes.byref(handle), 0)
            ptr = handle.value
        assert ptr is not None
        self.ptr = ptr

    def synchronize(self) -> None:
        with cuda.Device(self.device):
            _call("standInWait", ctypes.c_void_p(self.ptr))

    def __enter__(self) -> _Stream:
        _current_streams.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _current_streams.pop()


_current_devices = [0]
_current_streams: list[_Stream] = []


def _get_current_stream(device: int | None = None) -> _Stream:
    device = _current_devices[-1] if device is None else device
    if _current_streams and _current_streams[-1].device == device:
        return _current_streams[-1]
    default = _Stream(0)
    default.device = device
    return default


class _Event:
    """Of what was queued on the current stream: it waits for that at once."""

    time = 0.0

    def record(self) -> None:
        _get_current_stream().synchronize()
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass


cuda = SimpleNamespace(
    Device=_Device,
    Event=_Event,
    Stream=_Stream,
    get_current_stream=_get_current_stream,
    get_elapsed_time=lambda begin, end: (end.time - begin.time) * 1e3,
    nvrtc=nvrtc,
)


class ndarray:  # noqa: N801, CuPy's name
    """In C order, or a view of one with its axes reversed."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, memory: _Memory, c_contiguous: bool = True) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.data = SimpleNamespace(ptr=memory.ptr)
        self.device = _Device(memory.device)
        self.flags = SimpleNamespace(c_contiguous=c_contiguous)
        self._memory = memory

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def T(self) -> ndarray:  # noqa: N802
        return ndarray(self.shape[::-1], self.dtype, self._memory, not self.flags.c_contiguous or len(self.shape) < 2)

    def get(self, out: np.ndarray | None = None) -> np.ndarray:
        """The array on the host, when all that is queued on the current stream is over."""
        shape = self.shape if self.flags.c_contiguous else self.shape[::-1]
        result = np.empty(shape, self.dtype) if out is None else out
        pointer, size = ctypes.c_size_t(self.data.ptr), ctypes.c_size_t(self.nbytes)
        with self.device:
            _call("standInRead", ctypes.c_void_p(result.ctypes.data), pointer, size, _stream())
        return result if self.flags.c_contiguous else result.T

    def set(self, values: np.ndarray) -> None:
        """Queues a write on the current stream."""
        values = np.ascontiguousarray(values, self.dtype)
        pointer, size = ctypes.c_size_t(self.data.ptr), ctypes.c_size_t(self.nbytes)
        with self.device:
            _call("standInWrite", pointer, ctypes.c_void_p(values.ctypes.data), size, _stream())

    def copy(self, order: str = "C") -> ndarray:
        with self.device:
            return asarray(self.get())


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(_get_current_stream().ptr)


def empty(shape: tuple[int, ...], dtype: Any = np.float64) -> ndarray:
    dtype = np.dtype(dtype)
    return ndarray(tuple(shape), dtype, _Memory(math.prod(shape) * dtype.itemsize, _current_devices[-1]))


def full(shape: tuple[int, ...], value: Any, dtype: Any) -> ndarray:
    result = empty(shape, dtype)
    result.set(np.full(shape, value, dtype))
    return result


def zeros(shape: tuple[int, ...], dtype: Any) -> ndarray:
    return full(shape, 0, dtype)


def copyto(target: ndarray, source: ndarray) -> None:
    """Queues a copy on the current stream."""
    to, of = (ctypes.c_size_t(x.data.ptr) for x in (target, source))
    with target.device:
        _call("cuMemcpyAsync", to, of, ctypes.c_size_t(source.nbytes), _stream())


def asarray(x: Any) -> ndarray:
    if isinstance(x, ndarray):
        return x
    if hasattr(x, "__cuda_array_interface__"):
        interface = x.__cuda_array_interface__
        memory = _Memory.__new__(_Memory)
        memory.ptr, memory.device, memory.owner = interface["data"][0], 0, x
        return ndarray(interface["shape"], np.dtype(interface["typestr"]), memory)
    x = np.asarray(x)
    result = empty(x.shape, x.dtype)
    result.set(x)
    return result


def ascontiguousarray(x: ndarray) -> ndarray:
    return x if x.flags.c_contiguous else x.copy()
