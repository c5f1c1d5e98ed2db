"""What an import brings with it: no MPI before init(), no torch for who does not use it."""

import subprocess
import sys

from mpirun import environment, run_ranks


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
print("done", rank)
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
