"""What is running here: versions, MPI, ranks, memory, devices.

python -m collective.info                 # this process
mpirun -np 4 python -m collective.info    # and where each rank is
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
from collections.abc import Sequence
from importlib import metadata

from . import __version__, _core, cuda_aware, lifecycle, mpi, ops, runtime, ucx
from .config import visible_devices
from .objects import allgather_object

__all__ = ["cores", "main", "mpi_name", "version_of"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print it, on rank 0; collective."""
    argparse.ArgumentParser(
        prog="python -m collective.info", description="Shows versions, MPI, ranks, memory and devices of this job."
    ).parse_args(arguments)
    lifecycle.init()
    devices, why_none = _core.devices()
    names = [name for name, _ in devices]
    local = runtime.local_rank()
    host = socket.gethostname()
    number = local % len(names) if names else -1
    device = f"{number} ({names[number]})" if names else "-"
    ranks = allgather_object((host, local, cores(), device))
    places = allgather_object((host, devices[number][1]) if names else None)
    visible = allgather_object(visible_devices())
    shares = runtime.current().engine.shares_memory()
    way = _device_way(number)
    if runtime.rank() == 0:
        print("\n".join(_lines(ranks, places, visible, shares, names, why_none, way)), flush=True)
    lifecycle.shutdown()  # where the others wait while rank 0 tries what the MPI can do


def _lines(
    ranks: list[tuple[str, int, int, str]],
    places: list[tuple[str, str] | None],
    visible: list[str | None],
    shares: bool,
    names: list[str],
    why_none: str,
    way: str,
) -> list[str]:
    hosts = len({host for host, *_ in ranks})
    lines = [
        f"collective {__version__}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version_of(name) or 'none'}" for name in ("numpy", "torch", "mpi4py", "cupy")),
        f"MPI       {mpi_name()}, from {_core.running_mpi_path()}; built for {_core.built_for_mpi()}",
        f"CPU       kernels for {_core.simd_name()}",
        f"memory    {_memory(len(ranks), hosts, shares)}",
        f"devices   {'' if len(set(visible)) == 1 else 'of rank 0: '}{_devices(names, why_none)}",
    ]
    if names:
        lines.append(f"          {way}")
    sharing = [rank for rank, place in enumerate(places) if place is not None and places.count(place) > 1]
    if sharing:
        lines.append(f"          fewer than ranks: ranks {', '.join(map(str, sharing))} share with others")
    if names:
        answer = cuda_aware.find_out(several_nodes=hosts > 1)
        lines.append(f"CUDA-aware  {answer.how}")
        wheel = ucx.directory()
        if not answer.aware and wheel is not None and not ucx.is_loaded(wheel):
            lines.append(
                f"          {wheel} has a UCX with CUDA; before mpirun: " + 'eval "$(python -m collective.ucx)"'
            )
    visibles = [f"CUDA_VISIBLE_DEVICES={value}  " if value is not None else "" for value in visible]
    width = max(map(len, visibles))
    lines += ["", f"rank  host                  local rank  cores  {'':<{width}}device"]
    for rank, ((host, local, count, device), shown) in enumerate(zip(ranks, visibles, strict=True)):
        lines.append(f"{rank:<4}  {host:<20}  {local:<10}  {count:<5}  {shown:<{width}}{device}")
    lines += ["", f"{'algorithms':<28}  {'size':>8}  {'below':<22}  above"]
    for what, size, below, above in _core.thresholds():
        lines.append(f"{what:<28}  {size >> 10:>4} KiB  {below:<22}  {above}")
    if len(ranks) == 1:
        lines += ["", "One rank. More: mpirun -np 2 python -m collective.info"]
    return lines


def _device_way(number: int) -> str:
    """How arrays on devices are reduced, found out by reducing one; collective."""
    why_not = "no device" if number < 0 else ""
    if not why_not:
        try:
            import cupy
        except ImportError as error:
            why_not = f"CuPy: {error}"
    reasons = allgather_object(why_not)
    for rank, reason in enumerate(reasons):
        if reason:
            return f"how arrays on devices are reduced was not tried: rank {rank}: {reason}"
    with cupy.cuda.Device(number):
        ops.allreduce(cupy.zeros((1 << 16,), dtype="float32"), ops.Sum)
    return f"arrays on devices are {runtime.current().engine.device_way()}"


def _memory(ranks: int, hosts: int, shares: bool) -> str:
    if ranks == 1:
        return "one rank has nobody to share it with"
    if shares:
        return "shared by all ranks"
    if hosts > 1:
        return "on several nodes: all-reduces go through that of each node, all else in messages"
    return "not shared, which is slower: see the warning above, or COLLECTIVE_SHARED_MEMORY"


def _devices(names: list[str], why_none: str) -> str:
    if not names:
        return f"none: {why_none}"
    return ", ".join(f"{number} {name}" for number, name in enumerate(names))


def mpi_name() -> str:
    """The MPI in use, and its version."""
    return mpi.name_and_version(_core.running_mpi())


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version_of(name: str) -> str | None:
    """The version of a package, None if it is not installed; CuPy goes by several names."""
    for distribution in (name, f"{name}-cuda13x", f"{name}-cuda12x"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


if __name__ == "__main__":
    main()
