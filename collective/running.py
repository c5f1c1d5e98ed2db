"""Run a function of this process on the ranks of a new MPI job, as `horovod.run` does."""

from __future__ import annotations

import os
import pickle
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle

from . import job_command, mpi, mpirun
from .config import environment_outside_the_job
from .errors import CollectiveError, InvalidArgumentError
from .hosts import given
from .job_command import Job

__all__ = ["run"]

T = TypeVar("T")

_END = 10.0  # seconds for mpirun to end its ranks and to remove its files
# Horovod's other arguments, and which of their values, besides None, ask for what is done anyway.
_HOROVOD: dict[str, tuple[object, ...]] = {
    "use_mpi": (True, False),
    "use_gloo": (False,),
    "disable_cache": (True, False),
    **dict.fromkeys(("start_timeout", "output_filename", "slots", "host_discovery_script"), ()),
    **dict.fromkeys(("min_num_proc", "max_num_proc", "min_np", "max_np", "reset_limit", "cooldown_range"), ()),
    **dict.fromkeys(("ssh_port", "ssh_identity_file", "network_interface", "network_interfaces"), ()),
}
_CALL, _RESULTS, _FAILURE = "call.pickle", "results.pickle", "failure"


def run(
    func: Callable[..., T],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    np: int | None = None,
    *,
    num_proc: int | None = None,
    hosts: str | None = None,
    hostfile: str | os.PathLike[str] | None = None,
    mpi_args: str | None = None,
    executable: str | None = None,
    env: Mapping[str, str] | None = None,
    verbose: int | None = None,
    **horovod: object,
) -> list[T]:
    """Call a function on every rank of a new MPI job, and return the results in rank order.

    Args:
        func: a function that cloudpickle can serialise; it calls `init()` itself, as a script does.
        args, kwargs: its arguments, the same on all ranks.
        np: how many ranks; `num_proc` is Horovod's later name for it. One unless given.
        hosts: where they run, "a:2,b:2"; this host unless given.
        hostfile: the same as a file, in the form of Open MPI and Horovod (node1 slots=2) or of Hydra (node1:2).
        mpi_args: more arguments for mpirun, as in a shell: "--bind-to none".
        executable: the Python of the ranks; this one unless given.
        env: added to the environment of the ranks.
        verbose: whether to print the command.
        horovod: Horovod's other arguments are refused if they ask for anything but mpirun and fixed ranks.

    The job is started by the mpirun of the MPI in use, beside the Python of the ranks or on PATH; its output is shown.
    An exception in this process, such as Ctrl-C's, ends it. Rank 0 runs on this host, and the function and its results
    travel by MPI.

    Raises:
        InvalidArgumentError: a number of ranks below one, an argument of Horovod's that cannot be met, hosts that are
            none, or no mpirun of this MPI.
        CollectiveError: a rank raised, and the message holds its traceback; or the job failed, and has said why.
    """
    size = np if num_proc is None else num_proc
    if size is None:
        size = 1
    if not isinstance(size, int) or size < 1 or None not in (np, num_proc):
        raise InvalidArgumentError(f"run takes one positive number of ranks, not np={np!r}, num_proc={num_proc!r}")
    for argument, value in horovod.items():
        if argument not in _HOROVOD:
            raise TypeError(f"run() got an unexpected keyword argument {argument!r}")
        if value is not None and value not in _HOROVOD[argument]:
            raise InvalidArgumentError(
                f"run({argument}={value!r}) is not possible here: mpirun starts the job, whose ranks stay the same. "
                f"Options for mpirun go into mpi_args."
            )
    python = executable or sys.executable
    inherited = environment_outside_the_job()
    launcher = mpirun.find(python, inherited)
    places = given(hosts, hostfile)
    with tempfile.TemporaryDirectory(prefix="collective-run-") as name:
        directory = Path(name)
        (directory / _CALL).write_bytes(cloudpickle.dumps((func, tuple(args), dict(kwargs or {}))))
        # Not by -m, which would run this module a second time, and warn about it.
        program = "import sys; from collective import running; running.on_a_rank(sys.argv[1])"
        job = Job(size, [python, "-c", program, name], hosts=places, more=shlex.split(mpi_args or ""))
        command = job_command.command(launcher, job)
        if verbose:
            print(shlex.join(command), file=sys.stderr)
        # The module that the function comes from need not be installed.
        path = os.pathsep.join(filter(None, [inherited.get("PYTHONPATH"), *sys.path]))
        status = _status(command, {**inherited, "PYTHONPATH": path, **(env or {})})
        failures = sorted(directory.glob(f"{_FAILURE}.*"), key=lambda file: file.stat().st_mtime_ns)
        if failures:
            raise CollectiveError(f"run: rank {failures[0].suffix[1:]} raised\n{failures[0].read_text()}")
        if status != 0 or not (directory / _RESULTS).exists():
            raise CollectiveError(f"run: {' '.join(command[:3])} ended with status {status}")
        results: list[T] = pickle.loads((directory / _RESULTS).read_bytes())
    return results


def _status(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run mpirun to its end, or terminate it: subprocess.run kills it, which ranks do not notice."""
    process = subprocess.Popen(command, env=env)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def on_a_rank(name: str) -> None:
    """What the ranks do; `name` is the directory that the caller has made."""
    directory = Path(name)
    mpi.start()
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    call = comm.bcast((directory / _CALL).read_bytes() if comm.rank == 0 else None)
    try:
        func, args, kwargs = cloudpickle.loads(call)
        result = cloudpickle.dumps(func(*args, **kwargs))
    except Exception:
        if directory.exists():  # on the caller's host; elsewhere it is only printed
            (directory / f"{_FAILURE}.{comm.rank}").write_text(traceback.format_exc())
        traceback.print_exc()
        sys.stderr.flush()
        comm.Abort(1)
    results = comm.gather(result)
    if results is not None:
        (directory / _RESULTS).write_bytes(cloudpickle.dumps([pickle.loads(one) for one in results]))
