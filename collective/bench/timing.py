"""How a time is taken.

A sample is the time of k back-to-back calls between two barriers, divided by k; the slowest rank's counts. k is chosen
so that a sample takes a few milliseconds, which a busy machine may leave undisturbed. As many uncounted calls come
first: what a contender finds in caches, and which ranks are awake, is its own doing, not its predecessor's. Contenders
take turns: a round takes one sample of each, in a different order every time, the same on all ranks. So noise on the
machine affects all alike, the median over rounds is what a user sees, the minimum is what the machine can do, and two
contenders' samples from one round may be subtracted.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .job import Job

__all__ = ["Run", "Samples", "measure", "rounds_for"]

Run = Callable[[int], object]
"""Makes the given number of calls."""

_MOST_CALLS = 1024

_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 15


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one value per round, the largest of all ranks: on the clock, and of CPU over all threads."""

    wall: list[float]
    cpu: list[float]


def measure(
    job: Job, runs: Mapping[str, Run], rounds: int, sample_seconds: float = 0.003, warm_up: bool = True
) -> dict[str, Samples]:
    """Time every run in turn; collective: all ranks pass the same runs in the same order.

    Args:
        runs: by contender.
        rounds: samples of each, after at least one call that is not counted, or two with `warm_up`.
        sample_seconds: roughly the time of a sample, if a call takes less.
        warm_up: make uncounted calls before each sample; what they change does not matter to calls of 0.1 s.
    """
    calls = {name: _calibrate(job, run, sample_seconds, warm_up) for name, run in runs.items()}
    names = list(runs)
    taken = np.empty((len(names), rounds, 2))
    for number in range(rounds):
        for which in random.Random(number).sample(range(len(names)), len(names)):
            name = names[which]
            taken[which, number] = _sample(job, runs[name], calls[name], warm_up)
    slowest = np.empty_like(taken)
    from mpi4py import MPI

    job.comm.Allreduce(taken, slowest, MPI.MAX)
    return {
        name: Samples(wall=values[:, 0].tolist(), cpu=values[:, 1].tolist())
        for name, values in zip(names, slowest, strict=True)
    }


def rounds_for(seconds: float) -> int:
    """How many samples to take of a call that takes so long: what fits into a second, but from 3 to 15."""
    return max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, int(1 / seconds)))


def _sample(job: Job, run: Run, calls: int, warm_up: bool = True) -> tuple[float, float]:
    if warm_up:
        run(calls)
    job.comm.Barrier()
    cpu = time.process_time()
    begin = time.perf_counter()
    run(calls)
    wall = time.perf_counter() - begin
    return wall / calls, (time.process_time() - cpu) / calls


def _calibrate(job: Job, run: Run, sample_seconds: float, warm_up: bool) -> int:
    """The number of calls that a sample needs, the same on all ranks."""
    from mpi4py import MPI

    calls = 1  # and one before it, which connects, allocates, agrees on names
    while True:
        wall, _ = _sample(job, run, calls, warm_up)
        seconds: float = max(job.comm.allreduce(wall, MPI.MAX), 1e-9)
        wanted = min(_MOST_CALLS, math.ceil(sample_seconds / seconds))
        if wanted <= 2 * calls:
            return max(wanted, 1)
        calls = min(wanted, 8 * calls)  # the first calls are slower than the rest
