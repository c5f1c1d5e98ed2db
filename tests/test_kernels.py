"""The kernels for devices: what compilers make of them, and what is told and kept. What they compute: test_csrc.py."""

import ctypes
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from collective import kernels
from collective.kernels import KernelsUnavailableError, image

HERE = Path(__file__).parent
SOURCE = Path(kernels.__file__).with_name("kernels.cu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "collective"


# ---- compilers ----


@pytest.mark.slow
def test_nvcc_compiles_without_warnings_spills_and_stack(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    oldest, newer = ("-gencode=arch=compute_75,code=sm_75", "-gencode=arch=compute_90,code=sm_90")
    command = [nvcc, "-fatbin", oldest, newer, "--threads=2", "-std=c++17", "--fmad=false", "-Werror", "all-warnings"]
    command += ["-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage", SOURCE, "-o", tmp_path / "out.fatbin"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    usage = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    assert set(re.findall(usage, done.stderr)) == {("0", "0", "0")}
    assert done.stderr.count("Compiling entry function") == 2 * (13 + 12 + 10 * 4 + 2 * 2 + 4)


@pytest.mark.slow
def test_nvrtc_compiles_for_devices_of_now_and_of_later() -> None:
    try:
        compiler = kernels._compiler()
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    assert image((9, 0)).startswith(b"\x7fELF")
    newest = max(compiler.architectures)
    ptx = image((newest // 10 + 1, 0))
    assert f".target sm_{newest}".encode() in ptx
    assert ptx.endswith(b"\n\0")


def test_the_stand_in_compiles_for_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(HERE / "stand_in" / "cupy")
    import nvrtc

    install(monkeypatch, nvrtc)
    (tmp_path / "kernels.so").write_bytes(image((8, 0)))
    library = ctypes.CDLL(str(tmp_path / "kernels.so"))
    assert library.reduce_float32_sum
    assert library.convert_float32_bfloat16
    assert library.collective_run
    monkeypatch.setattr(nvrtc, "_FLAGS", ["-no-such-flag"])
    with pytest.raises(KernelsUnavailableError, match=r"(?s)NVRTC_ERROR_COMPILATION.*-no-such-flag"):
        image((9, 0))


# ---- the cache, and what is told ----


class Nvrtc(SimpleNamespace):
    """Compiles to the number of its run."""

    NVRTCError = RuntimeError

    def __init__(self) -> None:
        super().__init__(version=(12, 4), runs=[])

    def getVersion(self) -> tuple[int, int]:  # noqa: N802, CuPy's names
        return self.version

    def getSupportedArchs(self) -> tuple[int, ...]:  # noqa: N802
        return 75, 80, 86, 90

    def createProgram(  # noqa: N802
        self, source: str, name: str, headers: Sequence[bytes], include_names: Sequence[bytes]
    ) -> int:
        assert "__global__" in source
        assert b"struct Launch" in headers[0]
        assert include_names == [b"launch.h"]
        return 7

    def compileProgram(self, program: int, options: Sequence[str]) -> None:  # noqa: N802
        self.runs.append(options)

    def getCUBIN(self, program: int) -> bytes:  # noqa: N802
        return b"cubin %d" % len(self.runs)

    def getPTX(self, program: int) -> bytes:  # noqa: N802
        return b"PTX %d" % len(self.runs)

    def destroyProgram(self, program: int) -> None:  # noqa: N802
        pass


def install(monkeypatch: pytest.MonkeyPatch, nvrtc: object) -> None:
    """As CuPy's."""
    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(nvrtc=nvrtc)
    monkeypatch.setitem(sys.modules, "cupy", cupy)


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> Nvrtc:
    fake = Nvrtc()
    install(monkeypatch, fake)
    return fake


def test_what_is_compiled_is_kept_for_the_device_and_the_compiler(nvrtc: Nvrtc, cache: Path) -> None:
    assert image((8, 0)) == b"cubin 1"
    assert image((8, 0)) == b"cubin 1"
    assert image((9, 0)) == b"cubin 2"
    nvrtc.version = (12, 5)
    assert image((8, 0)) == b"cubin 3"
    assert [options[0] for options in nvrtc.runs] == [f"--gpu-architecture=sm_{n}" for n in (80, 90, 80)]
    assert all("--fmad=false" in options for options in nvrtc.runs)
    assert len(list(cache.iterdir())) == 3, "a temporary file is left"


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: content + b"x"])
def test_a_damaged_file_is_replaced(nvrtc: Nvrtc, cache: Path, damage: Callable[[bytes], bytes]) -> None:
    image((8, 0))
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert image((8, 0)) == b"cubin 2"
    assert image((8, 0)) == b"cubin 2"


def test_a_link_is_replaced_by_what_was_compiled(nvrtc: Nvrtc, cache: Path) -> None:
    image((8, 0))
    (path,) = cache.iterdir()
    path.rename(cache.parent / "elsewhere")
    path.symlink_to(cache.parent / "elsewhere")
    assert [image((8, 0)), image((8, 0))] == [b"cubin 2", b"cubin 2"]


@pytest.mark.parametrize("what", ["folder", "file", "owner of the folder", "owner of the file"])
def test_what_others_may_have_put_there_is_not_loaded(
    nvrtc: Nvrtc, cache: Path, what: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is compiled instead, each time, and told once."""
    monkeypatch.setattr(kernels, "_told", False)
    image((8, 0))
    (path,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert image((8, 0)) == b"cubin 1"
    assert capfd.readouterr().err == ""
    at = cache if "folder" in what else path
    if "owner" in what:
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(at, 12345, -1)
    else:
        at.chmod(0o770 if what == "folder" else 0o620)
    found = [image((8, 0)), image((8, 0))]
    # A file is replaced by one of ours, in a folder that is ours.
    assert found == [b"cubin 2", b"cubin 3" if "folder" in what else b"cubin 2"]
    told = capfd.readouterr().err
    assert told.count("compiled kernels are neither kept nor taken from the cache") == 1
    assert str(at) in told


def test_without_a_cache_every_call_compiles(nvrtc: Nvrtc, cache: Path) -> None:
    cache.write_text("no directory")  # permissions do not stop root
    assert image((8, 0)) == b"cubin 1"
    assert image((8, 0)) == b"cubin 2"


def test_devices_newer_than_the_compiler_get_ptx_and_older_ones_an_error(nvrtc: Nvrtc) -> None:
    assert image((10, 0)) == b"PTX 1\0"
    assert image((8, 9)) == b"PTX 2\0"
    assert [options[0] for options in nvrtc.runs] == [f"--gpu-architecture=compute_{n}" for n in (90, 86)]
    with pytest.raises(KernelsUnavailableError, match=r"12\.4 compiles for compute capability 7\.5 and .* has 6\.1"):
        image((6, 1))


def test_what_is_missing_or_broken_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if not installed
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(KernelsUnavailableError, match=r"neither CuPy nor cuda\.bindings is .* pip install"):
        image((8, 0))
    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cupy.py").write_text("raise ImportError('libcudart.so.12: no such file')")
    with pytest.raises(KernelsUnavailableError, match=r"CuPy is installed but broken: libcudart.* pip install"):
        image((8, 0))
