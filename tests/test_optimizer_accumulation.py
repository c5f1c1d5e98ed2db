"""Gradients of several backward passes, and gradients that change between their backward pass and the step."""

import contextlib
import random
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from harness.plugin import World
from training import ALL, EACH_ITS_OWN, SOME, WAYS, Layers, Loss, Twins, settings


@pytest.mark.ranks(1, 2, 3)
def test_as_many_passes_as_promised_or_fewer_or_more(world: World) -> None:
    def passes_of(rank: int, step: int, count: int) -> int:
        return count if step < 4 else (count + rank) % 4  # later they differ between ranks, and may be none

    for threshold, shared_memory in WAYS:
        with settings(threshold, shared_memory=shared_memory):
            for promised, count in ((2, 2), (3, 1), (1, 3), (2, 5)):
                twins = Twins(world, Layers(), backward_passes_per_step=promised)
                for step in range(8):
                    twins.zero_grad(set_to_none=step % 3 > 0)
                    for number in range(count + world.size):

                        def loss(model: Any, rank: int, step: int = step, number: int = number) -> Any:
                            has_one = number < passes_of(rank, step, count)  # noqa: B023 - called at once
                            return model.loss(rank, 10 * step + number) if has_one else None

                        twins.backward(loss)
                    twins.step()
                    twins.check()


@pytest.mark.ranks(2)
def test_number_of_passes_may_change_between_steps(world: World) -> None:
    with settings(SOME):
        twins = Twins(world, Layers())
        for step, passes in enumerate((1, 3, 2, 1)):
            twins.optimizer.set_backward_passes_per_step(passes)
            twins.zero_grad()
            for number in range(passes):
                twins.backward(lambda model, rank, data=10 * step + number: model.loss(rank, data))
            twins.step()
            twins.check()
        for bad in (0, -1, 1.5):
            with pytest.raises(ValueError, match="positive integer"):
                twins.optimizer.set_backward_passes_per_step(bad)


@pytest.mark.ranks(2, 3)
def test_no_sync(world: World) -> None:
    with settings(EACH_ITS_OWN):
        twins = Twins(world, Layers())
        for step in range(6):
            twins.zero_grad()
            with twins.optimizer.no_sync():
                for number in range(2):
                    twins.backward(lambda model, rank, data=10 * step + number: model.loss(rank, data))
            if step % 2:  # else the step comes at once
                twins.backward(lambda model, rank, data=10 * step + 2: model.loss(rank, data))
            twins.step()
            twins.check()


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("in the middle of backward")


@pytest.mark.ranks(2, 3)
def test_exception_in_backward(world: World) -> None:
    def fails(model: Layers) -> None:
        x = Fails.apply(model(torch.ones(2, 5, dtype=torch.float64), [0]))
        with pytest.raises(ArithmeticError):
            model(x, [1, 2]).sum().backward()  # layers 2 and 1 have got their gradients, layer 0 has not

    with settings(EACH_ITS_OWN):
        twins = Twins(world, Layers())
        for step in range(6):
            twins.zero_grad()
            if step % 3 == 0 or (step % 3 == 1 and world.rank == 1):
                fails(twins.model)
                twins.optimizer.zero_grad()
            # And another time the rank leaves out the batch that failed.
            again: Loss = lambda model, rank, s=step: None if s == 4 and rank == 1 else model.loss(rank, s)  # noqa: E731
            twins.backward(again)
            twins.step()
            twins.check()


@pytest.mark.ranks(2)
def test_reentrant_checkpoints(world: World) -> None:
    """A layer that is used in two of them gets its gradient in two pieces within one backward."""
    with settings(EACH_ITS_OWN):
        twins = Twins(world, Layers())

        def loss(model: Any, rank: int) -> Any:
            x = torch.full((2, 5), 1.0 + rank, dtype=torch.float64, requires_grad=True)
            for which in ([0, 1], [1, 2]):
                x = checkpoint(model, x, which, use_reentrant=True)
            return x.square().mean()

        twins.train([loss] * 4)
        twins.check()


@pytest.mark.ranks(2, 3, 4)
def test_anything_goes(world: World) -> None:
    """Each rank does as it likes from step to step; the gradient is the mean of what all have done."""
    for seed in range(6):
        dice = random.Random(seed)  # the same on all ranks
        depth = dice.randint(1, 5)
        with settings(dice.choice((EACH_ITS_OWN, SOME, 2 * SOME, ALL)), shared_memory=seed % 2 == 0):
            twins = Twins(world, Layers(depth, width=3), backward_passes_per_step=dice.randint(1, 3))
            for step in range(12):
                keeps = [dice.random() < 0.3 for _ in range(world.size)]  # zeros rather than None
                passes = [
                    [
                        (dice.random() < 0.3, [n for n in range(depth) if dice.random() < 0.6])
                        for _ in range(dice.randint(0, 3))
                    ]
                    for _ in range(world.size)
                ]
                factors = [dice.choice((1, 1, 0.5, -2)) for _ in range(world.size)]
                twins.optimizer.zero_grad(set_to_none=not keeps[world.rank])
                twins.alone.zero_grad(set_to_none=not any(keeps))
                for number in range(3):

                    def loss(model: Any, rank: int) -> Any:
                        if number >= len(passes[rank]) or not passes[rank][number][1]:  # noqa: B023 - called at once
                            return None
                        which = passes[rank][number][1]  # noqa: B023
                        factor = factors[rank] if model is twins.twin else 1  # noqa: B023
                        return model.loss(rank, 10 * step + number, which) * factor  # noqa: B023

                    alone = number < len(passes[world.rank]) and passes[world.rank][number][0]
                    with twins.optimizer.no_sync() if alone else contextlib.nullcontext():
                        twins.backward(loss)
                for p in twins.model.parameters():
                    if p.grad is not None and factors[world.rank] != 1:
                        p.grad.mul_(factors[world.rank])
                if dice.random() < 0.3:
                    twins.optimizer.synchronize()
                twins.step()
                twins.check(1e-11)
