"""The kernels for arrays on devices, compiled for the device that is there.

`kernels.cu` ships as source: NVRTC compiles it, in six to nine seconds, and the result is kept in the user's cache.
NVRTC is CuPy's or, where CuPy lacks it, that of `cuda.bindings`, which torch's wheels for CUDA bring. ROCm would be a
third class beside these two, with hipRTC: the source has what it needs (no CUDA header; float16 without PTX where the
compiler has no __CUDA_ARCH__).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from .. import _core
from ..config import LogLevel, cache_directory

__all__ = ["KernelsUnavailableError", "image"]

_OPTIONS = ("--std=c++17", "--fmad=false")  # contracted, results would not have the bits of the host's
_NAME, _HEADER = "kernels.cu", "launch.h"
_INSTALL = "pip install cupy-cuda12x, or cupy-cuda13x where nvidia-smi shows CUDA 13"


class KernelsUnavailableError(Exception):
    """There are no kernels for this device; the message says what to install."""


class _Compiler(Protocol):
    version: tuple[int, int]
    architectures: Sequence[int]  # 90 for compute capability 9.0

    def compile(self, source: bytes, header: bytes, options: Sequence[str]) -> bytes:
        """A cubin, or PTX where the options ask for a compute_* architecture."""
        ...


class _CupyNvrtc:
    def __init__(self) -> None:
        import cupy

        self._nvrtc: Any = cupy.cuda.nvrtc
        self.version = self._nvrtc.getVersion()
        self.architectures = self._nvrtc.getSupportedArchs()

    def compile(self, source: bytes, header: bytes, options: Sequence[str]) -> bytes:
        nvrtc = self._nvrtc
        program = nvrtc.createProgram(source.decode(), _NAME, [header], [_HEADER.encode()])
        try:
            try:
                nvrtc.compileProgram(program, tuple(options))
            except nvrtc.NVRTCError as error:
                raise KernelsUnavailableError(f"NVRTC: {error}\n{nvrtc.getProgramLog(program)}") from None
            result: bytes = nvrtc.getPTX(program) if _is_ptx(options) else nvrtc.getCUBIN(program)
            return result
        finally:
            nvrtc.destroyProgram(program)


class _BindingsNvrtc:
    def __init__(self) -> None:
        self._nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
        major, minor = self._call("nvrtcVersion")
        self.version = (major, minor)
        (self.architectures,) = self._call("nvrtcGetSupportedArchs")

    def compile(self, source: bytes, header: bytes, options: Sequence[str]) -> bytes:
        encoded = [option.encode() for option in options]
        (program,) = self._call("nvrtcCreateProgram", source, _NAME.encode(), 1, [header], [_HEADER.encode()])
        try:
            try:
                self._call("nvrtcCompileProgram", program, len(encoded), encoded)
            except KernelsUnavailableError as error:
                log = self._output("ProgramLog", program).decode(errors="replace")
                raise KernelsUnavailableError(f"{error}\n{log}") from None
            return self._output("PTX" if _is_ptx(options) else "CUBIN", program)
        finally:
            self._call("nvrtcDestroyProgram", program)

    def _output(self, what: str, program: Any) -> bytes:
        (size,) = self._call(f"nvrtcGet{what}Size", program)
        result = bytes(size)
        self._call(f"nvrtcGet{what}", program, result)
        return result

    def _call(self, function: str, *arguments: Any) -> Any:
        error, *results = getattr(self._nvrtc, function)(*arguments)
        if error:
            raise KernelsUnavailableError(f"NVRTC: {function}: {error.name}")
        return results


def image(capability: tuple[int, int]) -> bytes:
    """The module of all kernels for a device of this compute capability, as cuModuleLoadData takes it.

    From the cache, or compiled. Raises KernelsUnavailableError.
    """
    compiler = _compiler()
    option = _architecture(capability, compiler)
    options = (option, *_OPTIONS)
    here = Path(__file__).parent
    source, header = ((here / name).read_bytes() for name in (_NAME, _HEADER))
    key = hashlib.sha256(repr((source, header, options, compiler.version)).encode()).hexdigest()
    path = cache_directory() / f"kernels-{key[:32]}"
    found = _cached(path)
    if found is None:
        found = compiler.compile(source, header, options)
        if _is_ptx(options):
            found = found.rstrip(b"\0") + b"\0"  # which marks its end for the driver
        _keep(path, found)
    return found


def _compiler() -> _Compiler:
    reasons = []
    for package, kind in (("CuPy", _CupyNvrtc), ("cuda.bindings", _BindingsNvrtc)):
        try:
            return kind()
        except ModuleNotFoundError as error:
            if error.name not in ("cupy", "cuda", "cuda.bindings", "cuda.bindings.nvrtc"):
                reasons.append(f"{package} is installed but broken: {error}")
        except Exception as error:  # whatever it raises where libraries are missing or of another version
            reasons.append(f"{package} is installed but broken: {error}")
    found = "; ".join(reasons) or "neither CuPy nor cuda.bindings is installed"
    raise KernelsUnavailableError(f"the kernels for CUDA devices are compiled by NVRTC, and {found}. Try: {_INSTALL}")


def _architecture(capability: tuple[int, int], compiler: _Compiler) -> str:
    wanted = capability[0] * 10 + capability[1]
    if wanted in compiler.architectures:
        return f"--gpu-architecture=sm_{wanted}"
    older = [known for known in compiler.architectures if known < wanted]
    if not older:
        raise KernelsUnavailableError(
            f"NVRTC {'.'.join(map(str, compiler.version))} compiles for compute capability "
            f"{min(compiler.architectures) / 10} and above, and this device has {wanted / 10}. Try: {_INSTALL}"
        )
    # A device newer than this NVRTC: its driver compiles PTX of an older architecture when it loads the module.
    return f"--gpu-architecture=compute_{max(older)}"


def _is_ptx(options: Sequence[str]) -> bool:
    return "compute_" in options[0]


# A file holds the image behind its own hash, since a full disk or a crash may cut it short. Without a cache, every
# process compiles.
_HASH = hashlib.sha256
_told = False


class _NotPrivateError(OSError):
    """Others may have put it there: its hash is no proof, for anybody can compute that."""


def _check_private(file: int, path: Path) -> None:
    """Refuse a file or folder that is not ours, or that others may write to."""
    status = os.fstat(file)
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _NotPrivateError(f"{path} belongs to another user or may be written by others")


@contextlib.contextmanager
def _cache(path: Path) -> Iterator[int]:
    """The folder, open. Names are looked up relative to it, so that whoever may write above it cannot exchange it."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _check_private(folder, path)
        yield folder
    finally:
        os.close(folder)


def _cached(path: Path) -> bytes | None:
    try:
        with _cache(path.parent) as folder, open(os.open(path.name, os.O_NOFOLLOW, dir_fd=folder), "rb") as file:
            _check_private(file.fileno(), path)
            content = file.read()
    except _NotPrivateError as error:
        _tell(error)
        return None
    except OSError:
        return None
    size = _HASH().digest_size
    return content[size:] if content[:size] == _HASH(content[size:]).digest() else None


def _keep(path: Path, content: bytes) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _cache(path.parent) as folder:
            name = f"{path.name}.{os.getpid()}"
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
            try:
                with open(file, "wb") as written:
                    written.write(_HASH(content).digest() + content)
                # Atomically, for ranks that read or write it at the same time.
                os.replace(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                os.unlink(name, dir_fd=folder)
                raise


def _tell(error: _NotPrivateError) -> None:
    global _told
    if not _told:
        _told = True
        _core.log(
            LogLevel.WARNING,
            f"compiled kernels are neither kept nor taken from the cache: {error}. Remove it, or take others' "
            f"permission to write away (chmod go-w); XDG_CACHE_HOME names another place",
        )
