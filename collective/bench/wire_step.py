"""The second half of the workload `wire`: a training step that computes for about as long as it communicates.

Then the most can be hidden, and the most be lost: a step without any overlap takes twice the time of the local one.
The network is a chain of linear layers; its batch is chosen so that the local step takes as long as the reduction of
its gradients alone (`communication`). The CPU time is that of the whole process: what backward has to share its core
with.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from . import c10d
from .buffers import check
from .job import Job
from .peers import OURS
from .results import Result
from .timing import measure, rounds_for
from .training import Trainer, measure_steps, ready

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["COMMUNICATION", "CPU", "STEP", "TIME", "wire_step"]

STEP = "wire step"
"""The name of the results."""

TIME, CPU = "time", "CPU"
"""The cases: seconds on the clock, and of all threads of the process."""

COMMUNICATION = "communication"

_LAYERS, _WIDTH = 8, 512  # 8.4 MB of parameters
_TRIED = (32, 256)  # batches from whose times the right one is told
_TRIES = 3


def wire_step(job: Job, rounds: int | None, chosen: Sequence[str]) -> list[Result]:
    """Measure steps without communication, and with each kind of it; collective.

    Contenders: DistributedOptimizer, also with float16 on the wire; DistributedDataParallel over gloo; an
    MPI_Allreduce of each gradient after backward.
    """
    if not ready(job, STEP):
        return []
    import torch

    from .reduction import Reduction

    torch.manual_seed(job.rank)  # so that gradients differ between ranks until they are reduced
    job.progress(f"{STEP}, {COMMUNICATION}")
    reduction = Reduction([(name, tuple(p.shape)) for name, p in _network().named_parameters()])
    check(reduction.arrays(), reduction.run, job.rank, job.size, f"{STEP}, {COMMUNICATION}")
    seconds = statistics.median(measure(job, {COMMUNICATION: reduction.run}, _TRIES)[COMMUNICATION].wall)
    batch = _batch(job, seconds)
    job.progress(f"{STEP}, batch {batch}")
    data = _data(batch)
    trainers = {"local": Trainer(_network(), batch=data), OURS: Trainer(_network(), wrap=True, batch=data)}
    if "fp16" in chosen:
        trainers[f"{OURS} fp16"] = Trainer(_network(), wrap=True, compression="fp16", batch=data)
    if "gloo" in chosen and c10d.connect(job):
        from torch.nn.parallel import DistributedDataParallel

        trainers["ddp gloo"] = Trainer(DistributedDataParallel(_network(), gradient_as_bucket_view=True), batch=data)
    if "mpi" in chosen:
        trainers["mpi"] = _AfterBackward(job, _network(), batch=data)
    steps = {name: trainer.step for name, trainer in trainers.items()}
    samples = measure_steps(job, {COMMUNICATION: partial(reduction.run, 1), **steps}, rounds or rounds_for(seconds))
    for name, trainer in trainers.items():
        trainer.check(job, name != "local", f"{STEP}, {name}")
    nbytes = sum(4 * array.numel() for array in reduction.arrays())
    job.note(
        f"{STEP}: {nbytes / 1e6:.1f} MB of gradients; batch {batch} per rank, chosen so that the local step takes as "
        "long as their reduction alone"
    )
    return [
        Result(STEP, case, name, of.wall if case == TIME else of.cpu, nbytes=nbytes)
        for name, of in samples.items()
        for case in (TIME, CPU)
    ]


class _AfterBackward(Trainer):
    """Averages each gradient by a call of MPI when all are there."""

    def __init__(self, job: Job, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        super().__init__(model, batch=batch)
        self._job = job
        self._parameters = list(model.parameters())

    def backward(self) -> None:
        """Then reduce."""
        from mpi4py import MPI

        super().backward()
        for parameter in self._parameters:
            assert parameter.grad is not None
            self._job.comm.Allreduce(MPI.IN_PLACE, [parameter.grad.numpy(), MPI.FLOAT], MPI.SUM)
            parameter.grad /= self._job.size


def _network() -> nn.Module:
    from torch import nn

    return nn.Sequential(*(layer for _ in range(_LAYERS) for layer in (nn.Linear(_WIDTH, _WIDTH), nn.ReLU())))


def _data(batch: int) -> tuple[Tensor, Tensor]:
    import torch

    return torch.randn(batch, _WIDTH), torch.randint(_WIDTH, (batch,))


def _batch(job: Job, seconds: float) -> int:
    """With which a local step takes about so long on the slowest rank; the same on all ranks."""
    trainers = {str(batch): Trainer(_network(), batch=_data(batch)) for batch in _TRIED}
    samples = measure_steps(job, {name: trainer.step for name, trainer in trainers.items()}, _TRIES)
    short, long = (statistics.median(samples[str(batch)].wall) for batch in _TRIED)
    slope = max(long - short, 1e-6) / (_TRIED[1] - _TRIED[0])
    return max(1, round(_TRIED[0] + (seconds - short) / slope))
