"""What each of the two ranks that `cuda_aware.py` starts does: send device memory to the other, check what arrives.

It reports on standard output how far it got, since a signal may end it at any line.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MARK", "main"]

MARK = "collective-cuda-aware-probe"
SIZES = (64, 4 << 20)  # bytes: sent at once; sent once the receiver has answered


class _DriverError(Exception):
    pass


class _WrongBytesError(Exception):
    pass


def main(seconds: int) -> None:
    """Run as one of two ranks, for at most this long."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is an answer here
    signal.alarm(seconds)  # ends it inside C code, too, and when its launcher is gone
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if world.Get_size() != 2:
        _say("alone")
        return
    world.Barrier()
    _say("started")
    try:
        driver = _Driver(world.Get_rank())
        for nbytes in SIZES:
            _exchange(driver, world, nbytes)
    except _DriverError as error:
        _say("device", str(error))
        world.Abort(1)  # the other rank would wait
    except (MPI.Exception, _WrongBytesError) as error:
        _say("error", str(error))
        world.Abort(1)
    else:
        _say("good")


def _say(word: str, text: str = "") -> None:
    line = f"{MARK} {word} {' '.join(text.split())}"
    os.write(1, f"\n{line}\n".encode())  # in one write, so that lines of both ranks do not mix


class _Driver:
    """The CUDA driver, with a context of one device current in this thread."""

    def __init__(self, rank: int) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise _DriverError(str(error)) from None
        count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", ctypes.c_uint(0))
        self.call("cuDeviceGetCount", ctypes.byref(count))
        if count.value == 0:
            raise _DriverError("no CUDA device is visible")
        # Given two devices, each rank takes one, as the ranks of a job do.
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(rank % count.value))
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxPushCurrent_v2", context)

    def call(self, name: str, *arguments: Any) -> None:
        error = getattr(self._library, name)(*arguments)
        if error != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(error), ctypes.byref(text))
            raise _DriverError(f"{name}: {(text.value or b'error').decode()} ({error})")

    def allocate(self, values: npt.NDArray[np.uint8]) -> int:
        """The address of device memory that holds these bytes."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(values.nbytes))
        self.call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(values.nbytes))
        return address.value

    def read(self, address: int, nbytes: int) -> npt.NDArray[np.uint8]:
        values = np.empty(nbytes, np.uint8)
        self.call(
            "cuMemcpyDtoH_v2", ctypes.c_void_p(values.ctypes.data), ctypes.c_uint64(address), ctypes.c_size_t(nbytes)
        )
        return values

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(address))


def _pattern(rank: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """Bytes that differ by rank and index, and between parts of a message: no power of two is a multiple of 251."""
    return (np.arange(nbytes, dtype=np.uint32) % 251 + 3 * rank + 1).astype(np.uint8)


def _exchange(driver: _Driver, world: Any, nbytes: int) -> None:
    """Send and receive at the same time, by nonblocking calls as the engine does, and check what arrived."""
    from mpi4py import MPI

    rank = world.Get_rank()
    sent = driver.allocate(_pattern(rank, nbytes))
    received = driver.allocate(np.full(nbytes, 255, np.uint8))

    def memory(address: int) -> list[Any]:
        return [MPI.buffer.fromaddress(address, nbytes), MPI.BYTE]

    MPI.Request.Waitall([world.Irecv(memory(received), 1 - rank), world.Isend(memory(sent), 1 - rank)])
    differ = np.flatnonzero(driver.read(received, nbytes) != _pattern(1 - rank, nbytes))
    driver.free(sent)
    driver.free(received)
    if differ.size > 0:
        raise _WrongBytesError(f"of {nbytes} bytes, {differ.size} arrived wrong, the first at {differ[0]}")
