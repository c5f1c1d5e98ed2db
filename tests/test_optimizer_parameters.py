"""Which parameters have gradients, when and on which ranks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from mpi_plugin import World
from training import ALL, EACH_ITS_OWN, WAYS, Layers, Twins, parameter, settings, values


@pytest.mark.ranks(1, 2, 3)
def test_without_gradient_on_some_ranks_or_on_all(world: World) -> None:
    """None on all ranks stays None, so that momentum and weight decay leave the parameter alone."""
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
    plans: list[Callable[[int], list[int] | None]] = [
        lambda rank: [0, 1],  # layer 2 on no rank
        lambda rank: [rank],  # another layer on each rank
        lambda rank: [0, 1, 2] if rank == 1 else [2],
        lambda rank: [1] if rank == 0 else None,  # no backward at all on the others
        lambda rank: None,
        lambda rank: [2, 1, 0],
    ]
    for threshold, shared_memory in WAYS:
        with settings(threshold, shared_memory=shared_memory):
            twins = Twins(world, Layers(), make)
            for step, plan in enumerate(plans * 2):

                def loss(model: Any, rank: int, step: int = step, plan: Any = plan) -> Any:
                    return None if plan(rank) is None else model.loss(rank, step, plan(rank))

                twins.zero_grad()
                twins.backward(loss)
                twins.step()
                twins.check()
                if step == 0:
                    assert twins.model[2].weight.grad is None


@pytest.mark.ranks(2)
def test_freezing_and_unfreezing(world: World) -> None:
    for threshold in (EACH_ITS_OWN, ALL):
        with settings(threshold):
            model = Layers()
            model[0].requires_grad_(False)
            twins = Twins(world, model)
            for step in range(8):
                if step in (2, 4, 6):
                    for net in (twins.model, twins.twin):
                        net[0].requires_grad_(step != 4)
                        net[step // 2 - 1].weight.requires_grad_(step != 4)
                twins.zero_grad()
                twins.backward(lambda model, rank, step=step: model.loss(rank, step))
                twins.step()
                twins.check()


@pytest.mark.ranks(2, 3)
def test_groups_added_later(world: World) -> None:
    with settings(EACH_ITS_OWN):
        twins = Twins(world, Layers(1))
        for step in range(6):
            if step in (1, 3):  # between steps
                add_layer(twins, step)
            twins.zero_grad()
            twins.backward(lambda model, rank, step=step: model.loss(rank, step))
            if step == 4:  # between backward and step
                add_layer(twins, step)
            twins.step()
            twins.check()


def add_layer(twins: Twins, salt: int) -> None:
    for net, optimizer in ((twins.model, twins.optimizer), (twins.twin, twins.alone)):
        layer = torch.nn.Linear(5, 5, bias=False, dtype=torch.float64)
        layer.weight = parameter(5, 5, salt=salt)
        net.append(layer)
        optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.125})


@pytest.mark.ranks(2)
@pytest.mark.limit(30)
def test_group_added_while_ranks_differ(world: World) -> None:
    """Some ranks have started buckets in backward, others have not, when the parameters change."""
    with settings(EACH_ITS_OWN, timeout=10):
        twins = Twins(world, Layers())
        twins.train([lambda model, rank: model.loss(rank)])
        twins.zero_grad()
        twins.backward(lambda model, rank: model.loss(rank, 1) if rank == 0 else None)
        add_layer(twins, 1)
        twins.step()
        twins.check()


@pytest.mark.ranks(2, 3)
def test_two_optimizers_of_a_gan(world: World) -> None:
    """The generator's backward gives the discriminator gradients as well, which the next step throws away."""
    for threshold in (EACH_ITS_OWN, ALL):
        with settings(threshold):
            generator, discriminator = Twins(world, Layers(2)), Twins(world, Layers(3))

            def fool(g: Any, d: Any, rank: int, step: int) -> torch.Tensor:
                return (d(g(values((4, 5), rank, step))) - 1).square().mean()

            for step in range(6):
                generator.zero_grad()
                losses = [fool(generator.twin, discriminator.twin, rank, step) for rank in range(world.size)]
                (sum(losses) / world.size).backward()
                fool(generator.model, discriminator.model, world.rank, step).backward()
                generator.step()
                generator.check()
                discriminator.zero_grad(set_to_none=step % 2 == 0)
                for _ in range(2):  # real and fake
                    discriminator.backward(lambda d, rank, step=step: d.loss(rank, step))
                discriminator.step()
                discriminator.check()


@pytest.mark.ranks(2)
def test_tied_parameters(world: World) -> None:
    with settings(EACH_ITS_OWN):
        model = Layers()
        model[2].weight = model[0].weight
        twins = Twins(world, model)
        twins.train(lambda model, rank, step=step: model.loss(rank, step) for step in range(4))
        twins.check()
        assert model[2].weight is model[0].weight
