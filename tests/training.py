"""What tests of training share: settings, models and data that differ by rank, and a twin that trains alone."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

import collective
import collective.torch as hvd
from data import fill
from harness.plugin import World

Loss = Callable[[Any, int], torch.Tensor | None]  # of (model, rank); None: this rank has nothing to learn
MakeOptimizer = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]

EACH_ITS_OWN = 0  # bytes: every tensor has a bucket of its own, so all but one start during backward
SOME = 300  # a few small tensors share a bucket
ALL = 8 << 20  # one bucket per dtype, which starts in step()
# Of both parameters of settings(): fusion threshold, shared memory.
WAYS = [(EACH_ITS_OWN, True), (EACH_ITS_OWN, False), (SOME, False), (ALL, True)]


@contextlib.contextmanager
def settings(fusion_threshold: int = ALL, timeout: float = 20, shared_memory: bool = True) -> Iterator[None]:
    """Within it, the runtime is another one, with these settings; collective.

    Without shared memory, gradients travel in messages, as they do between nodes. A deadlock ends in an error
    after `timeout` seconds, and the world goes on with the next test.
    """
    values = {
        "COLLECTIVE_FUSION_THRESHOLD": str(fusion_threshold),
        "COLLECTIVE_TIMEOUT": str(timeout),
        "COLLECTIVE_STALL_WARNING": str(timeout / 2),
        "COLLECTIVE_SHARED_MEMORY": str(int(shared_memory)),
    }
    before = {name: os.environ.pop(name, None) for name in values}
    collective.shutdown()
    os.environ.update(values)
    try:
        collective.init()
        yield
    finally:
        collective.shutdown()
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
        collective.init()


def values(shape: int | tuple[int, ...], rank: int, salt: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """`data.fill` as a tensor, between -9/8 and 9/8: small enough to train on, and exact in every dtype."""
    real = torch.from_numpy(fill(shape, np.float64, rank, salt)) / 8
    if not dtype.is_complex:
        return real.to(dtype)
    return torch.complex(real, torch.from_numpy(fill(shape, np.float64, rank, salt + 1)) / 8).to(dtype)


def parameter(*shape: int, salt: int = 0, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    """The same on all ranks."""
    return torch.nn.Parameter(values(shape, 17, salt, dtype) / 2)


class Layers(torch.nn.ModuleList):
    """`depth` linear layers of one width; `forward(x, which)` goes through some of them."""

    def __init__(self, depth: int = 3, width: int = 5, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(torch.nn.Linear(width, width, dtype=dtype) for _ in range(depth))
        for salt, p in enumerate(self.parameters()):
            p.data = parameter(*p.shape, salt=salt, dtype=dtype).data
        self.width = width

    def forward(self, x: torch.Tensor, which: Iterable[int] | None = None) -> torch.Tensor:
        for number in range(len(self)) if which is None else which:
            x = torch.tanh(self[number](x))
        return x

    def loss(self, rank: int, step: int = 0, which: Iterable[int] | None = None) -> torch.Tensor:
        """On data of this rank and step."""
        dtype = self[0].weight.dtype
        x, y = (values((4, self.width), rank, 1000 + 2 * step + i, dtype) for i in range(2))
        return (self.forward(x, which) - y).square().mean()


def sgd(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.25, momentum=0.5)


class Twins:
    """A model that all ranks train with DistributedOptimizer, and its twin, which every rank trains by itself on
    the losses of all ranks: after each step the two are equal."""

    def __init__(self, world: World, model: Any, make: MakeOptimizer = sgd, **options: Any) -> None:
        self.world, self.model, self.twin = world, model, copy.deepcopy(model)
        self.alone = make(self.twin.parameters())
        self.optimizer: Any = hvd.DistributedOptimizer(make(model.parameters()), model.named_parameters(), **options)

    def backward(self, loss: Loss) -> None:
        """One backward pass: through this rank's loss in the model, through the ranks' mean in the twin."""
        self.backward_alone(loss)
        mine = loss(self.model, self.world.rank)
        if mine is not None:
            mine.backward()  # type: ignore[no-untyped-call]

    def backward_alone(self, loss: Loss) -> None:
        losses = [loss(self.twin, rank) for rank in range(self.world.size)]
        total = sum(one for one in losses if one is not None)
        if isinstance(total, torch.Tensor):
            (total / self.world.size).backward()  # type: ignore[no-untyped-call]

    def zero_grad(self, **options: Any) -> None:
        self.optimizer.zero_grad(**options)
        self.alone.zero_grad(**options)

    def step(self) -> None:
        self.optimizer.step()
        self.alone.step()

    def train(self, losses: Iterable[Loss]) -> None:
        """One step for each loss."""
        for loss in losses:
            self.zero_grad()
            self.backward(loss)
            self.step()

    def check(self, tolerance: float = 1e-12) -> None:
        """Parameters and gradients are those of the twin, and bit for bit those of the other ranks."""
        twins = dict(self.twin.named_parameters())
        for name, p in self.model.named_parameters():
            torch.testing.assert_close(
                p, twins[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert (p.grad is None) == (twins[name].grad is None), name
            if p.grad is not None:
                grads = [grad.to_dense() if grad.is_sparse else grad for grad in (p.grad, twins[name].grad)]
                torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)
        assert_same_on_all_ranks(self.world, self.model.parameters())


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_on_all_ranks(world: World, tensors: Iterable[torch.Tensor]) -> None:
    """Bit for bit; compared by mpi4py."""
    mine = [bits(tensor) for tensor in tensors]
    first = world.comm.bcast(mine)
    assert [number for number, own in enumerate(mine) if own != first[number]] == []
