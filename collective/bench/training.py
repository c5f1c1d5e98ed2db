"""The workloads `step` and `overlap`: whole training steps, with communication and without.

How much of the communication backward hides. Measured in turn: the step without communication (`local`), the
reduction of gradients of the same shapes alone (`communication`), and the step with both (`step`). Then

    hidden = 1 - (step - local) / communication

is 100 % if communication costs no time, 0 % if all of it is added on top, and negative if it also slows the rest.

- Behind computation (ResNet-50 on CPU threads). With as many ranks as cores, the engine's threads have no core of their
  own: each microsecond in which they copy and add is taken from the computation. Overlap can then hide waiting but no
  work, and a low figure says that the machine is full, not that the engine is late: compare `CPU added` with
  `communication`.
- Behind waiting: backward sleeps instead of computing, half as long again as the communication takes, as if a device
  computed. Then only a late start or a late end keeps communication from being hidden: this is the engine's own
  overlap. The last bucket, whose gradients come when backward ends, sets the upper limit.
"""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import c10d
from .buffers import check
from .job import Job, has_torch
from .peers import OURS
from .resnet50 import gradient_shapes
from .results import Result
from .timing import Run, Samples, measure

if TYPE_CHECKING:
    import torch

__all__ = ["Trainer", "differences", "measure_steps", "overlap", "ready", "step"]

_BATCH = 4
_PIXELS = 64
_WAIT = 1.5  # backward's wait as a multiple of the communication


def step(job: Job, rounds: int, with_gloo: bool) -> list[Result]:
    """ms per step of ResNet-50, batch 4 of 64 x 64 images and one torch thread per rank, SGD with momentum.

    Contenders: the step without communication, DistributedOptimizer (also with gradients that stay in their buckets,
    and with bfloat16 on the wire), and DistributedDataParallel with bucket views, over gloo and over this package's
    backend.
    """
    if not ready(job, "step"):
        return []
    import torch

    job.progress("step")
    torch.manual_seed(job.rank)  # so that gradients differ between ranks until they are reduced
    trainers = {"local": Trainer(_resnet()), OURS: Trainer(_resnet(), wrap=True)}
    trainers[f"{OURS} views"] = Trainer(_resnet(), wrap=True, as_view=True)
    trainers[f"{OURS} bf16"] = Trainer(_resnet(), wrap=True, compression="bf16")
    if with_gloo and c10d.connect(job):
        from torch.nn.parallel import DistributedDataParallel

        trainers["ddp gloo"] = Trainer(DistributedDataParallel(_resnet(), gradient_as_bucket_view=True))
        group = c10d.group_of_ours(job)
        trainers[f"ddp {OURS}"] = Trainer(
            DistributedDataParallel(_resnet(), process_group=group, gradient_as_bucket_view=True)
        )
    samples = measure_steps(job, {name: trainer.step for name, trainer in trainers.items()}, rounds)
    for name, trainer in trainers.items():
        trainer.check(job, name != "local", f"step, {name}")
    return [Result("step", f"ResNet-50, batch {_BATCH}", name, samples[name].wall) for name in trainers]


def overlap(job: Job, rounds: int) -> list[Result]:
    """The share of communication that backward hides, behind computation and behind waiting."""
    if not ready(job, "overlap"):
        return []
    import torch

    torch.manual_seed(job.rank)
    job.progress("overlap, computing")
    results, communication = _overlap(job, "computing", _resnet, rounds)
    job.progress("overlap, waiting")
    more, _ = _overlap(job, "waiting", lambda: _waiting(_WAIT * communication, job.rank), rounds)
    return results + more


def _overlap(job: Job, case: str, model: Callable[[], torch.nn.Module], rounds: int) -> tuple[list[Result], float]:
    from .reduction import Reduction

    local, ours, reduction = Trainer(model()), Trainer(model(), wrap=True), Reduction(gradient_shapes())
    check(reduction.arrays(), reduction.run, job.rank, job.size, f"overlap, {case}, communication")
    steps = {"local": local.step, "communication": lambda: reduction.run(1), "step": ours.step}
    samples = measure_steps(job, steps, rounds)
    local.check(job, False, f"overlap, {case}, local")
    ours.check(job, True, f"overlap, {case}, step")
    communication = statistics.median(samples["communication"].wall)
    added = differences(samples["step"].wall, samples["local"].wall)
    results = [Result("overlap", case, name, samples[name].wall) for name in steps]
    results.append(Result("overlap", case, "CPU added", differences(samples["step"].cpu, samples["local"].cpu)))
    results.append(Result("overlap", case, "hidden", [100 * (1 - a / communication) for a in added], unit="%"))
    return results, communication


def differences(a: list[float], b: list[float]) -> list[float]:
    """a - b, round by round."""
    return [x - y for x, y in zip(a, b, strict=True)]


def ready(job: Job, workload: str) -> bool:
    """Prepare torch for steps whose times can be compared. False, with a note, if it is not installed."""
    if not has_torch():
        job.note(f"{workload} is left out: torch is not installed")
        return False
    import torch

    torch.set_num_threads(1)
    # glibc gives freed memory back to the system, and gets it again by page faults, up to 15,000 a step or none at all,
    # depending on where the blocks of all contenders happen to lie: 0 to 30 ms, by mere chance. It keeps twice the
    # largest block of this kind that was ever freed; this is the largest it heeds.
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)
    return True


def measure_steps(job: Job, steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, Samples]:
    """Samples of single steps; collective."""

    def once(run: Callable[[], None]) -> Run:
        return lambda _: run()

    return measure(job, {name: once(run) for name, run in steps.items()}, rounds, sample_seconds=0.0)


def _resnet() -> torch.nn.Module:
    from .models import ResNet50

    return ResNet50()


def _waiting(seconds: float, rank: int) -> torch.nn.Module:
    """ResNet-50's parameters, block by block as layers, with a backward that waits."""
    from .models import WaitingModel

    layers: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in gradient_shapes():
        block = ".".join(name.split(".")[:2]) if name.startswith("layer") else "fc" if name[:2] == "fc" else "conv1"
        layers.setdefault(block, []).append(shape)
    return WaitingModel(list(layers.values()), seconds, gradient=1e-3 * (rank + 1))


class Trainer:
    """A model, its optimizer, and one batch that it sees again and again.

    Args:
        wrap: the optimizer is a DistributedOptimizer.
        compression: of DistributedOptimizer, by the name that hvd.Compression has for it.
        as_view: its gradient_as_bucket_view.
        batch: inputs and labels; None: images and 1000 classes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        wrap: bool = False,
        compression: str = "none",
        as_view: bool | None = None,
        batch: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        import torch

        from .. import torch as hvd

        self._model = model
        self._keeps_gradients = as_view is True
        if batch is None:
            batch = (torch.randn(_BATCH, 3, _PIXELS, _PIXELS), torch.randint(1000, (_BATCH,)))
        self._inputs, self._labels = batch
        self._optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        if wrap:
            self._optimizer = hvd.DistributedOptimizer(
                self._optimizer,
                named_parameters=model.named_parameters(),
                compression=getattr(hvd.Compression, compression),
                gradient_as_bucket_view=as_view,
            )

    def step(self) -> None:
        """Forward, backward, update."""
        self.backward()
        self._optimizer.step()

    def backward(self) -> None:
        """All but the update."""
        from torch.nn import functional

        self._optimizer.zero_grad(set_to_none=not self._keeps_gradients)
        output = self._model(self._inputs)
        loss: torch.Tensor = functional.cross_entropy(output, self._labels) if output.dim() == 2 else output.sum()
        loss.backward()  # type: ignore[no-untyped-call]

    def check(self, job: Job, reduced: bool, what: str) -> None:
        """Raise ArithmeticError unless the last step's gradients are equal on all ranks if, and only if, reduced."""
        digest = 0
        for parameter in self._model.parameters():
            assert parameter.grad is not None
            digest = zlib.crc32(parameter.grad.contiguous().view(-1).numpy().data, digest)
        alike = len(set(job.comm.allgather(digest))) == 1
        if job.size > 1 and alike is not reduced:
            raise ArithmeticError(f"{what}: gradients are {'' if alike else 'not '}alike on all ranks")
