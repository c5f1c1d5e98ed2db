"""The workload `idle`: what the engine costs while it has nothing to do."""

from __future__ import annotations

import time

import numpy as np

from .. import ops
from .job import Job
from .results import Result

__all__ = ["idle"]


def idle(job: Job, seconds: float) -> list[Result]:
    """The CPU time of the whole process, all its threads, over `seconds` of sleep, in percent of a core."""
    from mpi4py import MPI

    job.progress(f"idle, {seconds:g} s")
    ops.allreduce(np.zeros(1024, np.float32), name="bench.idle")  # so that the engine has worked before it rests
    job.comm.Barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    time.sleep(seconds)
    share = 100 * (time.process_time() - cpu) / (time.perf_counter() - wall)
    return [Result("idle", f"{seconds:g} s", "ours", [job.comm.allreduce(share, MPI.MAX)], unit="%")]
