"""The machine that the figures were taken on."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__, _core, info, runtime
from .buffers import cache_bytes
from .job import Job

__all__ = ["Others", "describe"]


def describe(job: Job) -> dict[str, Any]:
    """Machine, MPI, ranks and versions, for the head of a report; those of rank 0's node."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "processor": _processor(),
        "cores": info.cores(),
        "last_level_cache": cache_bytes(),
        "mpi": info.mpi_name(),
        "ranks": job.size,
        "ranks_per_node": job.local_size,
        "simd": _core.simd_name(),
        "settings": {name: str(value) for name, value in asdict(runtime.current().config).items()},
        "versions": {
            "collective": __version__,
            "python": platform.python_version(),
            **{name: info.version_of(name) for name in ("numpy", "torch", "mpi4py")},
        },
    }


class Others:
    """How busy the rest of the machine was during a run, since that decides what the figures are worth.

    On rank 0's node, if it has /proc/stat; time that a hypervisor gave to other machines counts, too.
    """

    def __init__(self, job: Job) -> None:
        from mpi4py import MPI

        self._node = job.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self._begin = self._now()

    def busy_cores(self) -> float | None:
        """Cores that were busy with something else, on average since this object was made; collective."""
        wall, all_cpu, our_cpu = (now - then for now, then in zip(self._now(), self._begin, strict=True))
        return max(0.0, (all_cpu - our_cpu) / wall) if all_cpu > 0 else None

    def _now(self) -> tuple[float, float, float]:
        """Seconds: on the clock, busy on all cores together, and used by the ranks of this node."""
        all_cpu = 0.0
        if Path("/proc/stat").exists():
            user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
            all_cpu = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), all_cpu, self._node.allreduce(time.process_time())


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()
