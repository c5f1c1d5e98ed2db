"""Whether the launcher has made this process one of as many ranks as it says, with cores to work on."""

from __future__ import annotations

import os
from pathlib import Path

from . import _core, mpi
from .config import Launched, launched
from .errors import InvalidArgumentError

__all__ = ["advice_about_cores", "check", "physical_cores"]


def check(size: int) -> None:
    """Refuse to be one of several single-rank trainings, which would end with status 0 as if all were well.

    Args:
        size: the number of ranks in MPI_COMM_WORLD.
    """
    if size > 1 or (found := launched()) is None:
        return
    raise InvalidArgumentError(
        f"{found.variable}={found.value}, so this process is one of several, but it is alone in MPI_COMM_WORLD of "
        f"{_core.built_for_mpi()}: each would train by itself. {_remedy(found)} "
        f"(If that is intended: init(MPI.COMM_SELF).)"
    )


def _remedy(found: Launched) -> str:
    ours = f"the mpirun of that MPI (mpirun -np {found.ranks} python ...)"
    match found.launcher:
        case "torchrun":
            return f"torchrun starts no MPI ranks: start the script with {ours} instead."
        case "srun":
            return f"Use srun {mpi.srun_option()} (srun --mpi=list shows which there are), or {ours}."
        case _:
            return (
                f"It was started by the launcher of another MPI, or by one that does not speak this one's PMI: use "
                f"{ours}, or under Slurm srun {mpi.srun_option()}."
            )


def advice_about_cores(local_size: int) -> str | None:
    """What to say about the cores of a node with this many ranks, this process among them; None: all is well."""
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    if local_size > there:
        return f"{local_size} ranks share the {there} cores of a node, where each waits for the others to be scheduled"
    if usable == 1 and local_size > 1 and there >= 2 * local_size:
        return (
            f"each rank is bound to one core of {there}, and its engine's thread needs one beside the computation: "
            f"mpirun --bind-to none, or --map-by slot:PE={there // local_size} --bind-to core; under Slurm "
            f"--cpus-per-task={there // local_size}"
        )
    return None


def physical_cores() -> int:
    """How many cores this process may use, hardware threads of one core together: launchers count them so."""
    cores = set()
    for number in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else f"{number}\n")
    return len(cores)
