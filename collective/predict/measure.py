"""The same training step for real, on the ranks of this job: its profile, and what it takes with communication."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .. import torch as hvd
from ..bench.job import Job
from ..bench.timing import Samples, measure
from .profile import Profile, take_profile
from .training import Training

__all__ = ["Steps", "measure_steps", "profile_job"]


@dataclass(frozen=True)
class Steps:
    """Steps of this job, which took turns: without communication, and with a DistributedOptimizer."""

    local: Samples
    distributed: Samples


def profile_job(job: Job, make: Callable[[], Training], name: str, steps: int) -> Profile:
    """The profile of a step of all ranks at the same time, as it runs in training; collective.

    The order of gradients is the mean over ranks, as in the reducer's plan. A time is that of the slowest rank: a
    bucket is reduced when the last rank has its gradients.
    """
    from mpi4py import MPI

    def on_all_ranks(order: list[int], times: list[float]) -> tuple[list[int], list[float]]:
        slowest = np.empty(len(times))
        job.comm.Allreduce(np.asarray(times), slowest, MPI.MAX)
        summed = np.empty(len(order), np.int64)
        job.comm.Allreduce(np.asarray(order, np.int64), summed, MPI.SUM)
        return summed.tolist(), slowest.tolist()

    return take_profile(make(), name, steps, together=job.comm.Barrier, on_all_ranks=on_all_ranks)


def measure_steps(job: Job, make: Callable[[], Training], steps: int, compression: str) -> Steps:
    """Train with and without communication, in turn; collective.

    Args:
        make: makes the model, anew for either contender.
        steps: how many samples of each.
        compression: of the gradients on the wire: none, fp16 or bf16.
    """
    local, distributed = make(), make()
    wrapped = hvd.DistributedOptimizer(
        distributed.optimizer,
        named_parameters=_named(distributed),
        compression=getattr(hvd.Compression, compression),
    )
    runs = {"local": _step(local), "distributed": _step(distributed._replace(optimizer=wrapped))}
    samples = measure(job, runs, steps, sample_seconds=0.0)
    return Steps(samples["local"], samples["distributed"])


def _named(training: Training) -> list[tuple[str, torch.nn.Parameter]]:
    held = {p for group in training.optimizer.param_groups for p in group["params"]}
    return [(name, p) for name, p in training.model.named_parameters() if p in held]


def _step(training: Training) -> Callable[[int], None]:
    def run(count: int) -> None:
        for _ in range(count):
            training.optimizer.zero_grad()
            training.loss().backward()  # type: ignore[no-untyped-call]
            training.optimizer.step()

    return run
