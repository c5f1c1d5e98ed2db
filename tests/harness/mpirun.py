"""How a job of MPI ranks is started, recognised and ended on this machine, with Open MPI or MPICH's kind."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import pytest

END_SECONDS = 10.0  # for mpirun to end its ranks and remove its files, before it is killed itself


def under_mpi() -> bool:
    """Whether this process is a rank that mpirun or srun started."""
    if any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")):
        return True  # Open MPI; Hydra (MPICH, Intel MPI); any PMIx launcher
    # A shell that salloc opened may have both of these and is no rank: srun gives ranks a PMI as well.
    slurm = "SLURM_NTASKS" in os.environ and "SLURM_PROCID" in os.environ
    return slurm and any(name.startswith(("PMI_", "PMI2_", "PMIX_")) for name in os.environ)


@functools.cache
def mpirun_command() -> tuple[str, ...]:
    """mpirun (beside the running python, else on PATH) with its options for more ranks than cores."""
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise FileNotFoundError(f"no mpirun beside {sys.executable} nor on PATH: the tests need an MPI")
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60, check=True)
    if "Open MPI" not in version.stdout + version.stderr:
        return (mpirun,)  # Hydra neither counts cores nor binds
    # A waiting rank must hand its core on, or 7 ranks on 2 cores take seconds per message.
    return (mpirun, "--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1")


def environment() -> dict[str, str]:
    """The environment for mpirun: ours, and what tests need; every name is harmless to the other MPIs."""
    env = dict(os.environ, PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1")
    env.setdefault("OMPI_MCA_osc", "^ucx")  # it prints an error line where there is no fast network
    env.setdefault("OMPI_MCA_btl", "^ofi")  # it sleeps a second in MPI_Init: 1.13 s with it, 0.12 s without
    if os.geteuid() == 0:  # in a container; Open MPI refuses root unless told twice
        env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return env


def start(
    size: int,
    arguments: Sequence[str],
    *,
    program: str | Path = sys.executable,
    under: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    stdout: int | IO[str] | None = None,
    stderr: int | IO[str] | None = None,
) -> "subprocess.Popen[str]":
    """Start `under mpirun program arguments...` on `size` ranks, to be ended by `end_job`.

    `under` is a command that runs mpirun; `env` is added to `environment()`.
    """
    return subprocess.Popen(
        [*under, *mpirun_command(), "-n", str(size), str(program), *arguments],
        env={**environment(), **(env or {})},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        errors="replace",
        start_new_session=True,  # so the terminal's Ctrl-C reaches pytest alone, which then ends the job
    )


def descendants(pid: int) -> list[int]:
    """The processes below `pid`, as /proc tells; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        children.setdefault(parent, []).append(int(stat.parent.name))
    below = list(children.get(pid, []))
    for child in below:  # grows while it is walked
        below += children.get(child, [])
    return below


def kill(pids: Sequence[int]) -> None:
    """SIGKILL processes of ours, of which some may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def end_job(process: "subprocess.Popen[str]") -> None:
    """End mpirun and its ranks, so that nothing stays behind.

    Asked by SIGTERM, mpirun ends its ranks and removes its files in /tmp and /dev/shm (Open MPI: in 2 s).
    SIGKILL is the last resort: it leaves those files, and Open MPI's ranks too, which are in process groups
    of their own and do not notice: so they are killed one by one.
    """
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        ranks = descendants(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        kill(ranks)
        process.wait()


def run_ranks(
    size: int,
    script: str | Path | Sequence[str | Path],
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    program: str | Path = sys.executable,
    under: Sequence[str] = (),
) -> "subprocess.CompletedProcess[str]":
    """Run a script, or the arguments of a python (or of another `program`), on `size` ranks; for unmarked tests only.

    `env` is added to the environment; `under` is a command that runs mpirun. Gives mpirun's exit status, stdout and
    stderr, of all ranks together, whose lines may be mixed up unless each is one write. A job that takes longer than
    `timeout` seconds is ended, and the test fails with what the job printed.
    """
    arguments = [str(script)] if isinstance(script, str | Path) else [str(part) for part in script]
    pipe = subprocess.PIPE
    process = start(size, arguments, program=program, under=under, env=env, cwd=cwd, stdout=pipe, stderr=pipe)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end_job(process)
        stdout, stderr = process.communicate()
        what = f"hang: {' '.join([str(program), *arguments])} on {size} ranks exceeded {timeout:g} s"
        pytest.fail(f"{what}\n--- stdout\n{stdout}\n--- stderr\n{stderr}", pytrace=False)
    except BaseException:  # Ctrl-C
        end_job(process)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
