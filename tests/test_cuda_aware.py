"""Whether the MPI sends device memory: tried on the stand-in for the driver, whose memory MPI cannot read, or can."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from collective._cuda_aware_probe import MARK
from harness.mpirun import environment, run_ranks
from test_device import stand_in  # noqa: F401

Env = dict[str, str]
OPEN = {"STAND_IN_CUDA_OPEN": "1"}


def find_out(env: Env, before: str = "") -> str:
    """The answer in a process that is no rank, after these lines."""
    code = f"import os\nfrom collective import _core, cuda_aware\n{before}\nprint(cuda_aware.find_out())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**environment(), **env}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("is_open", [False, True])
def test_tried_beside_a_job(is_open: bool, stand_in: Env) -> None:  # noqa: F811
    """Where it ends by a signal too, the job goes on."""
    script = """
import numpy as np
import collective
from collective import cuda_aware
collective.init()
if collective.local_rank() == 0:
    print(cuda_aware.find_out())
    print(cuda_aware.find_out(several_nodes=True))
assert collective.allreduce(np.ones(10), collective.Sum)[0] == 2
"""
    done = run_ranks(2, ["-c", script], 60, env={**stand_in, **(OPEN if is_open else {})})
    assert done.returncode == 0, done.stderr
    once, twice = done.stdout.splitlines()
    if is_open:
        assert once == "Answer(aware=True, how='yes: two ranks of this node sent each other device memory')"
        assert "aware=True" in twice
        assert "with the MPI's shared memory switched off" in twice
    else:
        assert once == "Answer(aware=False, how='no: two ranks tried it on this node and ended by SIGSEGV')"
        assert twice == once


def test_wrong_bytes_are_told(stand_in: Env) -> None:  # noqa: F811
    script = """
from mpi4py import MPI
from collective import _cuda_aware_probe as probe
right = probe._pattern
def wrong(rank, nbytes):
    values = right(rank, nbytes)
    values[nbytes - 7 * rank:] = 0
    return values
if MPI.COMM_WORLD.rank == 1:
    probe._pattern = wrong
probe.main(30)
"""
    done = run_ranks(2, ["-c", script], 60, env={**stand_in, **OPEN})
    assert f"{MARK} error of 64 bytes, 7 arrived wrong, the first at 57" in done.stdout, done.stdout + done.stderr
    assert "good" not in done.stdout


@pytest.mark.parametrize(("value", "answer"), [("1", "aware=True, how='yes: "), ("0", "aware=False, how='no: ")])
def test_the_setting_wins_and_nothing_is_tried(value: str, answer: str, stand_in: Env) -> None:  # noqa: F811
    told = find_out({**stand_in, "COLLECTIVE_CUDA_AWARE": value}, "cuda_aware._probe = None")
    assert told == f"Answer({answer}COLLECTIVE_CUDA_AWARE says so, nothing was tried')"


def test_without_a_device(stand_in: Env) -> None:  # noqa: F811
    assert find_out({**stand_in, "STAND_IN_CUDA_DEVICES": "0"}).startswith(
        'Answer(aware=False, how="no: the CUDA driver'
    )
    assert "a test could not use the device: cuMemAlloc_v2" in find_out(
        {**stand_in, "STAND_IN_CUDA_FAIL": "cuMemAlloc_v2:1"}
    )


ELSEWHERE = (
    "_core.running_mpi_path = lambda: '/nowhere/at/all/lib/libmpi.so'; "  # so that mpirun is searched on PATH alone
)


def test_without_a_launcher(stand_in: Env) -> None:  # noqa: F811
    told = find_out(stand_in, ELSEWHERE + "os.environ['PATH'] = ''")
    assert told.startswith(
        "Answer(aware=False, how='not known, so not used: no mpirun beside /nowhere/at/all/lib/libmpi.so "
    )
    assert "COLLECTIVE_CUDA_AWARE" in told


STARTED = f"echo '{MARK} started '; " * 2


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("echo 'an Error of mine' >&2; exit 3", "did not start two ranks for a test (status 3): an Error of mine"),
        (f"echo '{MARK} alone '", "is the launcher of another MPI than /nowhere/at/all/lib/libmpi.so"),
        ("sleep 600 & echo $! > sleeper; wait", "did not start two ranks for a test within 1 s"),
        (STARTED + "sleep 600 & echo $! > sleeper; wait", "no: two ranks tried it on this node and had not finished"),
        (STARTED + "echo 'signal 14'; exit 142", "no: two ranks tried it on this node and had not finished"),
        (STARTED + "exit 5", "no: two ranks tried it on this node, and mpirun ended with status 5"),
    ],
)
def test_launchers_that_do_something_else(does: str, told: str, stand_in: Env, tmp_path: Path) -> None:  # noqa: F811
    """Whatever they do, it ends, with all that they have started."""
    for name in ("mpirun", "mpirun.openmpi", "mpiexec.hydra"):
        launcher = tmp_path / name
        launcher.write_text(f"#!/bin/sh\ncd {tmp_path}\n{does}\n")
        launcher.chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    begin = time.monotonic()
    assert told in find_out({**stand_in, **path}, ELSEWHERE + "cuda_aware.LIMIT, cuda_aware._END = 1, 0.5")
    assert time.monotonic() - begin < 20
    if "sleeper" in does:
        state = Path(f"/proc/{(tmp_path / 'sleeper').read_text().strip()}/stat")
        assert not state.exists() or " Z " in state.read_text()


def test_info_tells_it(stand_in: Env) -> None:  # noqa: F811
    done = run_ranks(2, ["-m", "collective.info"], 60, env={**stand_in, **OPEN, "CUDA_VISIBLE_DEVICES": "0,1"})
    assert done.returncode == 0, done.stderr
    assert "\nCUDA-aware  yes: two ranks of this node sent each other device memory\n" in done.stdout
    assert done.stdout.count("  CUDA_VISIBLE_DEVICES=0,1  ") == 2
    done = run_ranks(1, ["-m", "collective.info"], 60, env={**stand_in, "STAND_IN_CUDA_DEVICES": "0"})
    assert "CUDA-aware" not in done.stdout
