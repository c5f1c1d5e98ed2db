"""Whether this MPI can send device memory.

python -m collective.cuda_aware                   # tries it with two processes; status 0: it can
python -m collective.cuda_aware --several-nodes   # and again without the MPI's shared memory

What an MPI says about itself (`ompi_info`, MPIX_Query_cuda_support) is how it was compiled, not what works here; and
where device memory is not supported, sending it ends in a crash or in wrong bytes. So two ranks try it, in processes of
their own beside the job (`_cuda_aware_probe.py`). Both run on this node: all they show of the network between nodes is
what the MPI does when told not to use shared memory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import _core
from ._cuda_aware_probe import MARK
from .config import Config, environment_outside_the_job

__all__ = ["Answer", "find_out", "main"]

LIMIT = 60  # seconds for one probe: some drivers take more than ten to start
_END = 5.0  # seconds for a launcher to end its ranks and remove its files


@dataclass(frozen=True)
class Answer:
    """Whether device memory can be handed to MPI, and how that is known, in one readable line.

    It holds for threads in which a context of the device is current, as it was in the ranks that tried.
    """

    aware: bool
    how: str  # begins with "yes", "no" or "not known"


@functools.cache
def find_out(several_nodes: bool = False) -> Answer:
    """Ask COLLECTIVE_CUDA_AWARE, else try it; not collective, and takes seconds the first time.

    Args:
        several_nodes: try a second time with the MPI's shared memory switched off, since the job needs the network.
    """
    given = Config.from_environment().cuda_aware
    if given is not None:
        return Answer(given, f"{'yes' if given else 'no'}: COLLECTIVE_CUDA_AWARE says so, nothing was tried")
    devices, why_none = _core.devices()
    if not devices:
        return Answer(False, f"no: {why_none}")
    environment = environment_outside_the_job()
    answer = _probe(environment)
    if answer.aware and several_nodes:
        answer = _probe(_without_shared_memory(environment))
        answer = Answer(answer.aware, f"{answer.how}, with the MPI's shared memory switched off")
    return answer


def _not_known(why: str) -> Answer:
    return Answer(False, f"not known, so not used: {why}; COLLECTIVE_CUDA_AWARE=1 (or 0) settles it")


def _launcher() -> str | None:
    """The mpirun of the MPI in use: beside its library, else on PATH."""
    library = Path(_core.running_mpi_path())
    # Not the root directory: /bin is beside everything.
    beside = [str(parent / "bin") for parent in list(library.parents)[:-1]] if library.is_absolute() else []
    # Debian installs several MPIs side by side, under these names.
    names = ("mpirun.openmpi", "mpirun") if _is_open_mpi() else ("mpiexec.hydra", "mpirun.mpich", "mpirun", "mpiexec")
    found = (shutil.which(name, path=path) for path in (*beside, None) for name in names)
    return next(filter(None, found), None)


def _is_open_mpi() -> bool:
    return "Open MPI" in _core.running_mpi()


def _probe(environment: dict[str, str]) -> Answer:
    mpirun = _launcher()
    if mpirun is None:
        return _not_known(f"no mpirun beside {_core.running_mpi_path()} or on PATH that could start a test")
    # On this node, whether or not it has two cores; Hydra (MPICH, Intel MPI) counts none, and takes "-hosts" only.
    options = ["--host", "localhost:2", "--oversubscribe", "--bind-to", "none"]
    command = [mpirun, *(options if _is_open_mpi() else ["-hosts", "localhost"]), "-n", "2"]
    # It finds the modules that this process finds, however that is.
    program = f"import sys; sys.path[:] = {sys.path!r}; from collective import _cuda_aware_probe as probe; "
    command += [sys.executable, "-c", program + f"probe.main({LIMIT})"]
    try:
        # Files, since a pipe would stay open until the last rank has ended.
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,  # a group that is ended as one; Ctrl-C does not reach it
            )
            try:
                status: int | None = process.wait(LIMIT + _END)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end(process)
            said = []
            for file in (stdout, stderr):
                file.seek(0)
                said.append(file.read().decode(errors="replace"))
    except OSError as error:
        return _not_known(f"{mpirun} does not start: {error}")
    return _read(mpirun, status, *said)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of the launcher's group; ranks in groups of their own end by their alarm."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END)


def _read(mpirun: str, status: int | None, stdout: str, stderr: str) -> Answer:
    """The answer, from the launcher's status (None: it did not end in time) and what the ranks and it have printed."""
    told = re.findall(rf"^{MARK} (\w+) (.*)$", stdout, re.MULTILINE)
    words = [word for word, _ in told]
    texts = dict(told)
    lines = [line.strip() for line in stderr.splitlines() if re.search(r"\w", line)]
    complaint = next((line for line in lines if "rror" in line), lines[0] if lines else "it says nothing")
    by = {int(number) for number in re.findall(r"signal:? (\d+)", stdout + stderr, re.IGNORECASE)}
    if status is not None and status > 128:
        by.add(status - 128)
    if status == 0 and words.count("good") == 2:
        return Answer(True, "yes: two ranks of this node sent each other device memory")
    if "error" in texts:
        return Answer(False, f"no: two ranks tried it on this node: {texts['error']}")
    if "device" in texts:
        return _not_known(f"a test could not use the device: {texts['device']}")
    if "alone" in texts:
        return _not_known(f"{mpirun} is the launcher of another MPI than {_core.running_mpi_path()}")
    if words.count("started") < 2:
        said = f"within {LIMIT} s" if status is None else f"(status {status}): {complaint}"
        return _not_known(f"{mpirun} did not start two ranks for a test {said}")
    for crash in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE):
        if crash in by:
            return Answer(False, f"no: two ranks tried it on this node and ended by {crash.name}")
    if status is None or signal.SIGALRM in by:
        return Answer(False, f"no: two ranks tried it on this node and had not finished after {LIMIT} s")
    return Answer(False, f"no: two ranks tried it on this node, and mpirun ended with status {status}: {complaint}")


def _without_shared_memory(environment: dict[str, str]) -> dict[str, str]:
    """The environment in which ranks of one node send as if they were on two.

    Heeded by Open MPI's own transports, MPICH, and UCX unless the user has set UCX_TLS; others do as before.
    """
    shared = ("sm", "smcuda", "vader")
    chosen = environment.get("OMPI_MCA_btl", "^")
    if chosen.startswith("^"):
        btl = "^" + ",".join([*filter(None, chosen[1:].split(",")), *shared])
    else:
        btl = ",".join(name for name in chosen.split(",") if name not in shared)
    return {"UCX_TLS": "^sm,cuda_ipc", **environment, "OMPI_MCA_btl": btl, "MPIR_CVAR_NOLOCAL": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the answer; 0 for yes, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m collective.cuda_aware", description="Tries whether this MPI can send device memory."
    )
    parser.add_argument(
        "--several-nodes", action="store_true", help="try again with the MPI's shared memory switched off"
    )
    answer = find_out(several_nodes=parser.parse_args(arguments).several_nodes)
    print(answer.how)
    return 0 if answer.aware else 1


if __name__ == "__main__":
    raise SystemExit(main())
