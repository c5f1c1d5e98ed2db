"""What an import brings with it: no MPI before init(), no torch unless used; and what it says where it fails."""

import shutil
import subprocess
import sys
from pathlib import Path

import mpi4py
import pytest

import collective
from collective import _core
from collective.torch import _requirements
from harness.mpirun import environment, run_ranks


def python(code: str) -> str:
    """What one python process prints, without a launcher."""
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_importing_starts_no_mpi() -> None:
    said = python(
        """
import sys
import mpi4py
import collective, collective.torch
print("mpi4py.MPI" in sys.modules, collective.is_initialized())
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Is_initialized())
"""
    )
    assert said == "False False\nFalse\n"


def test_importing_brings_no_framework() -> None:
    code = """
import sys
import collective
for module in ("torch", "cupy", "jax", "tensorflow"):
    assert module not in sys.modules, module
"""
    python(code)


def test_numpy_use_brings_no_torch() -> None:
    done = run_ranks(
        2,
        [
            "-c",
            """
import sys
import numpy as np
import collective
collective.init()
rank = collective.rank()
assert collective.allreduce(np.ones(5, np.float16), collective.Sum, compression="fp16")[4] == 2
assert collective.allreduce_(np.full((), rank), collective.Max) == 1
assert collective.broadcast(np.full(9, rank), 1)[8] == 1
assert list(collective.allgather(np.full(rank, rank))) == [1]
collective.barrier()
try:
    collective.allreduce([1, 2])
except collective.UnsupportedTypeError:
    pass
assert "torch" not in sys.modules
assert "mpi4py.MPI" in sys.modules
collective.shutdown()
print(f"done {rank}\\n", end="")  # one write, which the other rank's does not cut in two
""",
        ],
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "done 0", "done 1"]


def test_every_public_name_is_there() -> None:
    """And nothing else is offered: __all__ is complete and explicit."""
    python(
        """
import inspect
import collective
assert sorted(set(collective.__all__)) == sorted(collective.__all__)
for name in collective.__all__:
    assert getattr(collective, name) is not None, name
    assert name in ("Compression",) or inspect.getdoc(getattr(collective, name)), f"{name} has no docstring"
public = {n for n, v in vars(collective).items() if not n.startswith("_") and not inspect.ismodule(v)}
assert public == set(collective.__all__), public ^ set(collective.__all__)
"""
    )


def test_one_process_needs_no_launcher() -> None:
    """A script runs alone, too: one rank."""
    said = python(
        "import collective, numpy as np\n"
        "collective.init()\n"
        "print(collective.size(), collective.allreduce(np.full(3, 5.0)), collective.allgather(2))",
    )
    assert said == "1 [5. 5. 5.] [2]\n"


def fails(code: str, cwd: Path | None = None, **env: str) -> str:
    """The error of one python process: one traceback, whose last line tells all."""
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**environment(), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 1, process.stdout + process.stderr
    assert process.stderr.count("Traceback") == 1, process.stderr
    return process.stderr.splitlines()[-1]


def copy_of_the_package(directory: Path) -> Path:
    """Without its engine, as a source tree has it."""
    package = Path(collective.__file__).parent
    shutil.copytree(package, directory / "collective", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return directory / "collective"


def test_an_mpi_that_mpi4py_cannot_load_is_named() -> None:
    """Debian's MPICH has no libmpi.so.12, which mpi4py's wheel wants."""
    if not any(Path(mpi4py.__file__).parent.glob("MPI.openmpi.*")):  # one module for each ABI, in its wheel
        pytest.skip("mpi4py was compiled for its MPI")
    told = fails("import collective; collective.init()", MPI4PY_LIBMPI="/nowhere/libmpi.so.12")
    assert told.startswith("collective.errors.MPIMismatchError: mpi4py")
    assert "cannot load an MPI: libmpi.so.12 was not found" in told
    assert _core.running_mpi_path() in told
    assert "pip install --force-reinstall --no-deps --no-cache-dir --no-binary=mpi4py mpi4py" in told


@pytest.mark.parametrize("version", ["1.13.1", "2.2.2+cu121"])
def test_a_torch_that_is_too_old_is_named(version: str) -> None:
    told = fails(f"import torch; torch.__version__ = {version!r}; import collective.torch")
    assert told.startswith(f"ImportError: collective.torch needs torch 2.3 or later, and this is {version}, from /")


def test_the_oldest_torch_is_the_one_that_is_declared() -> None:
    declared = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    oldest = ".".join(map(str, _requirements.OLDEST))
    assert f'torch = ["torch>={oldest}"]' in declared
    for version in (f"{oldest}.0", f"{oldest}.0a0+6ddf5cf", "2.13.0+cpu", "2.19.0.dev20270101"):
        python(f"import torch; torch.__version__ = {version!r}; import collective.torch")


def test_a_source_tree_without_an_engine_says_so(tmp_path: Path) -> None:
    package = copy_of_the_package(tmp_path)
    # An editable installation would lend it the other tree's engine.
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in f'{f}'.lower()]; "
    told = fails(alone + "import collective.info", cwd=tmp_path)
    assert f"ImportError: {package} has no compiled engine for this Python" in told
    assert "start Python from another directory" in told
    assert "`make setup`" in told
    (package / "_core.cpython-17-other-machine.so").touch()
    assert "(only _core.cpython-17-other-machine.so)" in fails(alone + "import collective", cwd=tmp_path)


def test_an_engine_whose_mpi_is_not_there_says_so(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a compiler")
    package = copy_of_the_package(tmp_path)
    engine = package / Path(_core.__file__).name
    library = tmp_path / "libmpi.so.77"
    link = ["c++", "-shared", "-fPIC", "-x", "c++", "/dev/null", "-x", "none", "-Wl,--no-as-needed"]
    subprocess.run([*link, f"-Wl,-soname,{library.name}", "-o", library], check=True, timeout=60)
    subprocess.run([*link, library, "-o", engine], check=True, timeout=60)
    library.unlink()
    told = fails("import collective", cwd=tmp_path)
    assert "ImportError: the compiled engine cannot be loaded: libmpi.so.77 was not found. Load the MPI" in told
    engine.write_text("no library")
    assert "Install this package again" in fails("import collective", cwd=tmp_path)
