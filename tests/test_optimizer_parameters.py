"""Which parameters have gradients, when and on which ranks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import collective
import collective.torch as hvd
from collective import _core, runtime
from collective.handles import Handle
from harness.plugin import World
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
def test_plans_give_back_their_places(world: World) -> None:
    """Frozen in turns, parameters get a new plan each step: the numbers and tags of its buckets are used again."""
    float32 = _core.DType.float32
    for shared_memory in (True, False):
        with settings(shared_memory=shared_memory):
            engine = runtime.current().engine

            def opened(name: str, buckets: int, engine: _core.Engine = engine) -> int:
                layouts = [_core.BucketLayout(float32, float32, [1], 0, -1)] * buckets
                what = (float32, float32, _core.ReduceOp.Sum, 1.0, 1.0, "", "cpu", -1, 0)
                opening = _core.open_buckets(engine, 0, name, layouts, *what)
                Handle(engine, opening.ticket, None, lambda _: None).wait()
                return opening.buckets()[0].number

            collective.barrier()
            assert max(opened(f"plan{n}", 3) for n in range(60)) <= 9  # some wait for the last rank's word
            with pytest.raises(collective.InvalidArgumentError, match="buckets 'all': no room for 30000 more"):
                opened("all", 30000)
            parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(6)]
            optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), groups=3, op=hvd.Sum)
            expected = [0] * 6
            for step in range(30):
                optimizer.zero_grad()
                for n, parameter_n in enumerate(parameters):
                    parameter_n.requires_grad_(n % 3 != step % 3)
                    if n % 3 != step % 3:
                        parameter_n.grad = torch.full((3,), float((world.rank + 1) * (n + step)))
                        expected[n] -= (n + step) * world.size * (world.size + 1) // 2
                optimizer.step()
            assert [p.tolist() for p in parameters] == [[float(e)] * 3 for e in expected]
            optimizer.zero_grad()
            assert opened("last", 1) < 40


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


@pytest.mark.ranks(1, 2, 3)
def test_all_are_frozen(world: World) -> None:
    """From the start or in mid-training: a step with nothing to train is no error."""
    for options in ({}, {"groups": 2}, {"gradient_as_bucket_view": True}):
        with settings(ALL):
            twins = Twins(world, Layers(), **options)
            for step in range(6):
                for net in (twins.model, twins.twin):
                    net.requires_grad_(step in (2, 3))
                    if step == 4:
                        for p in net.parameters():
                            p.grad = None
                twins.zero_grad()
                if step in (2, 3):
                    twins.backward(lambda model, rank, s=step: model.loss(rank, s))
                twins.step()
                twins.check()


@pytest.mark.ranks(2)
def test_frozen_on_one_rank_alone(world: World) -> None:
    """An error on both that says which."""
    a, b = parameter(3), parameter(2)
    if world.rank == 1:
        b.requires_grad_(False)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([a, b], lr=1.0), [("a", a), ("b", b)])
    with pytest.raises(collective.MismatchError, match=r"b float64 \(2,\) on rank 0; a float64 \(3,\) on rank 1"):
        optimizer.step()


@pytest.mark.ranks(2)
def test_one_parameter_in_two_optimizers(world: World) -> None:
    shared, own = parameter(3), parameter(2)
    start = shared.detach().clone()
    first = hvd.DistributedOptimizer(torch.optim.SGD([shared], lr=1.0))
    second = hvd.DistributedOptimizer(torch.optim.SGD([shared, own], lr=1.0))
    for _ in range(3):
        for optimizer in (first, second):
            optimizer.zero_grad()
        ((world.rank + 1) * (shared.sum() + own.sum())).backward()
        for optimizer in (first, second):
            optimizer.step()
    torch.testing.assert_close(shared.detach(), start - 9.0)


@pytest.mark.ranks(2)
@pytest.mark.limit(40)  # checking names in quadratic time took 85 s
def test_twenty_thousand_parameters(world: World) -> None:
    named = [(f"p{number}", torch.nn.Parameter(torch.zeros(2))) for number in range(20_000)]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p for _, p in named], lr=1.0, foreach=True), named)
    for _, p in named:
        p.grad = torch.full((2,), float(world.rank))
    optimizer.step()
    assert all(p[0].item() == -0.5 for _, p in named)


@pytest.mark.ranks(2)
def test_parameters_and_gradients_without_memory_of_their_own(world: World) -> None:
    """An error on all ranks, where they would else train apart."""
    p = parameter(3, dtype=torch.float32)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), [("p", p)])
    p.grad = TwoTensor(torch.ones(3), torch.ones(3)) if world.rank == 0 else torch.ones(3)
    told = "gradient of 'p': a TwoTensor has no memory" if world.rank == 0 else "another rank"
    with pytest.raises(collective.UnsupportedTypeError, match=told):
        optimizer.step()
    w = torch.nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    with pytest.raises(collective.UnsupportedTypeError, match="'w': a TwoTensor has no memory"):
        hvd.DistributedOptimizer(torch.optim.SGD([w], lr=1.0), [("w", w)])
