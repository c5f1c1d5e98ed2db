"""setup.py: which wrapper and compiler it takes, what it says where one will not do, where the engine finds its MPI."""

import importlib.machinery
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from collective import _core
from harness.mpirun import environment
from test_csrc import mpicxx

ROOT = Path(__file__).parents[1]


def setup(*arguments: str | Path, **env: str) -> "subprocess.CompletedProcess[str]":
    """setup.py build_ext, in the source tree: where objects are made already, it links and no more."""
    command = [sys.executable, "setup.py", "-q", "build_ext", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env={**environment(), **env}, capture_output=True, text=True, timeout=600, check=False
    )


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run_path(library: Path) -> list[str]:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    shown = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "RPATH" not in shown.replace("RUNPATH", "")
    return [path for found in re.findall(r"RUNPATH.*\[(.*)\]", shown) for path in found.split(":")]


def installed(place: Path) -> Path:
    """The engine as an installation has it, below `place`."""
    done = setup("--build-lib", place, MPICXX=mpicxx())
    assert done.returncode == 0, done.stderr
    (library,) = place.glob("collective/_core*.so")
    return library


def mpi_prefix() -> Path:
    return Path(mpicxx()).absolute().parents[1]


def mpi_is_of_the_environment() -> bool:
    return mpi_prefix().resolve() == Path(sys.prefix).resolve()


def test_an_mpi_elsewhere_keeps_its_own_path(tmp_path: Path) -> None:
    """If it has one."""
    if mpi_is_of_the_environment():
        pytest.skip("the MPI is one of this environment")
    assert not [path for path in run_path(installed(tmp_path)) if path.startswith("$ORIGIN")]


def test_an_mpi_of_the_environment_is_found_by_a_relative_path(tmp_path: Path) -> None:
    """In the source tree and where it is installed."""
    if not mpi_is_of_the_environment():
        pytest.skip("the MPI is none of this environment")
    engine = installed(tmp_path)
    suffix = next(s for s in importlib.machinery.EXTENSION_SUFFIXES if engine.name.endswith(s))
    in_source = ROOT / "collective" / f"_core{suffix}"
    mpi = Path(_core.running_mpi_path())
    for library, place in (
        (in_source, in_source.parent),
        (engine, mpi_prefix() / "lib" / "pythonX/site-packages/collective"),
    ):
        paths = run_path(library)
        assert paths
        assert all(path.startswith("$ORIGIN/") for path in paths), paths
        found = [Path(os.path.normpath(path.replace("$ORIGIN", str(place)))).resolve() for path in paths]
        assert mpi.resolve().parent in found


def test_a_wrapper_that_is_none(tmp_path: Path) -> None:
    assert "is no program" in setup(MPICXX=str(tmp_path / "none")).stderr
    told = setup(MPICXX=str(script(tmp_path / "bin" / "mpicxx", "echo no licence >&2; exit 1"))).stderr
    assert "cannot compile a C++ file that includes mpi.h" in told
    assert "no licence" in told


@pytest.mark.parametrize(
    "how",
    [
        'case "$*" in *-std=c++20*) echo "unrecognized option -std=c++20" >&2; exit 1;; esac; exec "$real" "$@"',
        'exec "$real" "$@" | sed "s/__cplusplus [0-9]*L/__cplusplus 201709L/"',  # as GCC 10, which knows half of it
    ],
)
def test_a_compiler_before_cpp_20(tmp_path: Path, how: str) -> None:
    """It says which one was found, which is needed, and how to name another."""
    wrapper = script(tmp_path / "bin" / "mpicxx", f"real='{mpicxx()}'; {how}")
    told = setup(MPICXX=str(wrapper))
    assert told.returncode == 1
    assert re.search(rf"{wrapper} calls .*\d+\.\d+.*, which does not know C\+\+20", told.stderr), told.stderr
    assert "needs GCC 11, Clang 13 or a later one" in told.stderr
    assert "OMPI_CXX=" in told.stderr
    assert "Traceback" not in told.stderr


def test_intel_mpi_is_told_where_it_lies(tmp_path: Path) -> None:
    """Its wrapper, of the wheel impi-devel, knows that from I_MPI_ROOT alone."""
    script(tmp_path / "bin" / "impi_info", "")
    wrapper = script(tmp_path / "bin" / "mpicxx", 'echo "root: $I_MPI_ROOT" >&2; exit 1')
    assert f"root: {tmp_path}\n" in setup(MPICXX=str(wrapper)).stderr
    assert "root: /elsewhere\n" in setup(MPICXX=str(wrapper), I_MPI_ROOT="/elsewhere").stderr
