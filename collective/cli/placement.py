"""How many ranks a node gets, how many cores each of them has, and whether the launcher will have it so."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config import Slurm
from ..hosts import Host
from ..launcher import physical_cores
from ..mpirun import Kind, Launcher
from .options import Problem

__all__ = ["Placement", "check_root", "check_slots", "place"]

# What users bind ranks with, as options or variables of Open MPI 4 and 5, and of srun.
_BINDING_OPTIONS = ("bind-to", "map-by", "rank-by", "rankfile", "cpu-set", "cpu-bind", "cpus-per-task")
_BINDING_VARIABLES = (
    *("OMPI_MCA_hwloc_base_binding_policy", "OMPI_MCA_rmaps_base_mapping_policy"),
    *("PRTE_MCA_hwloc_default_binding_policy", "SLURM_CPU_BIND"),
)
_BATCH_SYSTEMS = ("SLURM_JOB_ID", "PBS_NODEFILE", "LSB_HOSTS", "LSB_DJOB_HOSTFILE", "PE_HOSTFILE")


@dataclass(frozen=True)
class Placement:
    """The launcher's options for cores, the number for OMP_NUM_THREADS, and one line that says both."""

    binding: tuple[str, ...]
    threads: int
    said: str


def place(
    launcher: Launcher,
    size: int,
    hosts: Sequence[Host],
    slurm: Slurm | None,
    environment: Mapping[str, str],
    binding: Sequence[str],
    more: Sequence[str],
) -> Placement:
    """Give each rank its share of the cores, and a launcher that would bind it to a single one the order not to."""
    here = _ranks_here(size, hosts, slurm)
    cores = slurm.cores if slurm is not None else physical_cores()
    threads = slurm.cores_per_rank if slurm is not None and slurm.cores_per_rank else max(1, cores // here)
    if "OMP_NUM_THREADS" in environment:
        omp = f"OMP_NUM_THREADS={environment['OMP_NUM_THREADS']} as given"
    else:
        omp = f"OMP_NUM_THREADS={threads} ({cores} cores here, {here} rank{'s' * (here > 1)})"
    chosen, why = _binding(launcher, slurm, environment, binding, more)
    ranks = f"{size} rank{'s' * (size > 1)}"
    return Placement(tuple(chosen), threads, f"{ranks} by {launcher}; {omp}; {why}")


def _ranks_here(size: int, hosts: Sequence[Host], slurm: Slurm | None) -> int:
    """The most ranks that a node gets, as launchers fill slots."""
    if not hosts:
        return -(-size // slurm.nodes) if slurm is not None else size
    ranks, left = [], size
    for host in hosts:
        ranks.append(min(host.slots, left))
        left -= ranks[-1]
    return max(ranks) + -(-left // len(hosts))


def _binding(
    launcher: Launcher,
    slurm: Slurm | None,
    environment: Mapping[str, str],
    binding: Sequence[str],
    more: Sequence[str],
) -> tuple[Sequence[str], str]:
    if binding:
        return binding, "bound by --binding-args"
    variable = next((name for name in _BINDING_VARIABLES if name in environment), None)
    if any(word in argument for argument in more for word in _BINDING_OPTIONS):
        return (), "bound by --mpi-args"
    if variable is not None and not launcher.kind.is_hydra:
        return (), f"bound by {variable}"
    if launcher.kind.is_open_mpi:
        return ("--bind-to", "none"), "not bound, for the engine's thread needs a core beside the computation"
    if launcher.kind is Kind.SRUN:
        if slurm is not None and slurm.cores_per_rank:
            return (f"--cpus-per-task={slurm.cores_per_rank}",), "bound to the cores of --cpus-per-task"
        return ("--cpu-bind=none",), "not bound, as the allocation names no --cpus-per-task"
    return (), "bound as the launcher does by itself"


def check_slots(
    launcher: Launcher,
    size: int,
    hosts: Sequence[Host],
    environment: Mapping[str, str],
    oversubscribe: bool,
    more: Sequence[str],
) -> None:
    """Raise a Problem for more ranks than slots, unless the user has asked for it."""
    asked = oversubscribe or any("oversubscribe" in argument.lower() for argument in more)
    asked = asked or "oversubscribe" in environment.get("PRTE_MCA_rmaps_default_mapping_policy", "").lower()
    if asked or environment.get("OMPI_MCA_rmaps_base_oversubscribe", "0").lower() in ("1", "true", "yes"):
        return
    if hosts:
        slots = sum(host.slots for host in hosts)
        if size > slots:
            raise Problem(
                f"{size} ranks do not fit on {', '.join(map(str, hosts))}, which is {slots} slot{'s' * (slots > 1)}: "
                f"ask for fewer ranks, more slots (-H {hosts[0].name}:{size}) or more hosts, or give --oversubscribe."
            )
    elif launcher.kind.is_open_mpi and not any(name in environment for name in _BATCH_SYSTEMS):
        cores = physical_cores()
        if size > cores and not any("host" in argument or "hwthread" in argument for argument in more):
            raise Problem(
                f"{size} ranks on {cores} core{'s' * (cores > 1)}: Open MPI starts one rank per core unless told "
                f"otherwise. Ask for fewer ranks, name more hosts (-H node1:2,node2:2), or give --oversubscribe: ranks "
                f"then take turns on the cores, which is slow."
            )


def check_root(launcher: Launcher, environment: Mapping[str, str], as_root: bool, more: Sequence[str]) -> None:
    """Raise a Problem if Open MPI would refuse to start anything for root."""
    if os.geteuid() != 0 or not launcher.kind.is_open_mpi or as_root or "--allow-run-as-root" in more:
        return
    for prefix in ("OMPI", "PRTE"):
        names = (f"{prefix}_ALLOW_RUN_AS_ROOT", f"{prefix}_ALLOW_RUN_AS_ROOT_CONFIRM")
        if all(environment.get(name) == "1" for name in names):
            return
    raise Problem(
        "this is root, for whom Open MPI starts nothing, since a mistake in a script could then damage the system. In "
        "a container, where that is no danger, give --allow-run-as-root (or set OMPI_ALLOW_RUN_AS_ROOT=1 and "
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1)."
    )
