"""A stand-in for cupy.cuda.nvrtc: compiles for the host, by g++. Its "cubin" is a shared object with a plain function
`void name(Launch)` for each kernel, and collective_run() of tests/csrc/kernels_on_host.h to launch them."""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_ON_HOST = Path(__file__).parents[2] / "csrc" / "kernels_on_host.h"
_FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w"]  # -w: of #pragma unroll


class NVRTCError(RuntimeError):
    pass


@dataclass
class _Program:
    source: str
    headers: dict[str, bytes]
    log: str = ""
    cubin: bytes = b""


_programs: dict[int, _Program] = {}
_numbers = itertools.count(1)


def getVersion() -> tuple[int, int]:  # noqa: N802, CuPy's names
    return 12, 9


def getSupportedArchs() -> tuple[int, ...]:  # noqa: N802
    return 75, 80, 90, 100


def createProgram(source: str, name: str, headers: list[bytes], include_names: list[bytes]) -> int:  # noqa: N802
    number = next(_numbers)
    _programs[number] = _Program(source, {n.decode(): h for n, h in zip(include_names, headers, strict=True)})
    return number


def compileProgram(number: int, options: tuple[str, ...]) -> None:  # noqa: N802
    program = _programs[number]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for header, content in program.headers.items():
            (directory / header).write_bytes(content)
        (directory / "source.cu").write_text(program.source)
        command = [os.environ.get("CXX", "g++"), *_FLAGS, "-I.", "-include", _ON_HOST, "-x", "c++", "source.cu"]
        done = subprocess.run([*command, "-o", "out.so"], cwd=directory, capture_output=True, text=True, check=False)
        program.log = done.stderr
        if done.returncode != 0:
            raise NVRTCError("NVRTC_ERROR_COMPILATION (6)")
        program.cubin = (directory / "out.so").read_bytes()


def getCUBIN(number: int) -> bytes:  # noqa: N802
    return _programs[number].cubin


def getProgramLog(number: int) -> str:  # noqa: N802
    return _programs[number].log


def destroyProgram(number: int) -> None:  # noqa: N802
    del _programs[number]
