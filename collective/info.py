"""What runs here: versions, MPI, ranks, memory, devices.

python -m collective.info                 # this process
mpirun -np 4 python -m collective.info    # and where each rank is
"""

from __future__ import annotations

import os
import platform
import socket
from importlib import metadata

from . import __version__, _core, runtime
from .objects import allgather_object

__all__ = ["main"]


def main() -> None:
    """Print it, on rank 0; collective."""
    runtime.init()
    devices, why_none = _core.devices()
    names = [name for name, _ in devices]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = runtime.local_rank()
    host = socket.gethostname()
    number = local % len(names) if names else -1
    device = f"{number} ({names[number]})" if names else "-"
    ranks = allgather_object((host, local, cores, device))
    places = allgather_object((host, devices[number][1]) if names else None)
    shares = runtime.current().engine.shares_memory()
    if runtime.rank() == 0:
        print("\n".join(_lines(ranks, places, shares, names, why_none)), flush=True)
    runtime.shutdown()


def _lines(
    ranks: list[tuple[str, int, int, str]],
    places: list[tuple[str, str] | None],
    shares: bool,
    names: list[str],
    why_none: str,
) -> list[str]:
    running = _core.running_mpi().strip("\0\n ").splitlines()[0].split(",")[0]
    lines = [
        f"collective {__version__}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {_version(name)}" for name in ("numpy", "torch", "mpi4py", "cupy")),
        f"MPI       {running}, from {_core.running_mpi_path()}; built for {_core.built_for_mpi()}",
        f"CPU       kernels for {_core.simd_name()}",
        f"memory    {_memory(len(ranks), len({host for host, *_ in ranks}), shares)}",
        f"devices   {_devices(names, why_none)}",
    ]
    if names:
        lines.append(
            "          arrays on devices travel by way of page-locked host memory, whether the MPI is CUDA-aware or not"
        )
    sharing = [rank for rank, place in enumerate(places) if place is not None and places.count(place) > 1]
    if sharing:
        lines.append(f"          fewer than ranks: ranks {', '.join(map(str, sharing))} share with others")
    lines += ["", "rank  host                  local rank  cores  device"]
    for rank, (host, local, cores, device) in enumerate(ranks):
        lines.append(f"{rank:<4}  {host:<20}  {local:<10}  {cores:<5}  {device}")
    if len(ranks) == 1 and len(names) == 0 and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        lines += ["", "One rank. More: mpirun -np 2 python -m collective.info"]
    return lines


def _memory(ranks: int, hosts: int, shares: bool) -> str:
    if ranks == 1:
        return "one rank has nobody to share it with"
    if shares:
        return "shared by all ranks"
    if hosts > 1:
        return "on several nodes; ranks exchange messages"
    return "not shared, which is slower: see the warning above, or COLLECTIVE_SHARED_MEMORY"


def _devices(names: list[str], why_none: str) -> str:
    if not names:
        return f"none: {why_none}"
    return ", ".join(f"{number} {name}" for number, name in enumerate(names))


def _version(name: str) -> str:
    for distribution in (name, f"{name}-cuda13x", f"{name}-cuda12x"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "none"


if __name__ == "__main__":
    main()
