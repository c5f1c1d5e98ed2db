"""join(): ranks that run out of data help the others until these have run out too."""

import gc

import numpy as np
import pytest
import torch

import collective
import collective.torch as hvd
from collective import Average, Max, Min, Product, Sum
from data import fill
from harness.plugin import World
from matrix import check, transport  # noqa: F401

pytestmark = [pytest.mark.ranks(1, 2, 3, 4), pytest.mark.usefixtures("transport")]


def still_there(world: World, step: int) -> list[int]:
    """Rank r has r + 2 steps."""
    return [rank for rank in range(world.size) if rank + 2 > step]


def test_every_collective_goes_on(world: World) -> None:
    for step in range(world.rank + 2):
        there = still_there(world, step)
        each = [fill(40_000, "float64", rank, step) for rank in there]
        x = fill(40_000, "float64", world.rank, step)
        root = world.size - 1  # joins last
        check(collective.allreduce(x, Sum), np.sum(each, axis=0), 0, step)
        check(collective.allreduce(x, Average, name="a"), np.sum(each, axis=0) / world.size, 1e-12, step)
        check(collective.allreduce(x, Min), np.min(each, axis=0), 0, step)
        check(collective.allreduce(x, Max), np.max(each, axis=0), 0, step)
        check(collective.allreduce(x[:9], Product), np.prod([e[:9] for e in each], axis=0), 0, step)
        check(collective.allgather(x[:2]), np.concatenate([e[:2] for e in each]), 0, step)
        check(collective.broadcast(x, root), fill(40_000, "float64", root, step), 0, step)
        total = np.array_split(np.sum(each, axis=0), world.size)
        check(collective.reducescatter(x, Sum), total[world.rank], 0, step)
        rows, received = collective.alltoall(np.full(world.size, world.rank))
        assert received == [int(rank in there) for rank in range(world.size)]
        check(rows, np.array(there), 0, step)
        gathered = collective.gather(x[:1], root)
        if gathered is not None:
            check(gathered, np.concatenate([e[:1] for e in each]), 0, step)
        collective.barrier()
    assert collective.join() == world.size - 1
    check(collective.allreduce(np.ones(2), Sum), np.full(2, world.size), 0)
    assert hvd.join() in range(world.size)  # at once, and again


@pytest.mark.ranks(2, 3, 4)
def test_a_root_that_has_joined_is_an_error(world: World) -> None:
    if world.rank > 0:
        # Rank 0 joins at its own time: until then the broadcast waits for it, after that it fails.
        with pytest.raises(collective.MismatchError, match="its root, rank 0, has joined"):
            collective.broadcast(np.ones(2), 0, name="rootless")
    collective.join()


def test_an_optimizers_buckets_go_on(world: World) -> None:
    """Two buckets, with gradients that tell the ranks apart; joined ranks count as zeros."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
    for p in model.parameters():
        torch.nn.init.ones_(p)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), named_parameters=model.named_parameters(), groups=2
    )
    for step in range(world.rank + 2):
        optimizer.zero_grad()
        model(torch.full((1, 4), float(world.rank + 1))).sum().backward()
        optimizer.step()
        mean = sum(rank + 1 for rank in still_there(world, step)) / world.size
        first, second = model.parameters()
        check(first.grad, np.full((3, 4), 2 * mean), 1e-5, step)
        check(second.grad, np.full((2, 3), 4 * mean), 1e-5, step)
    hvd.join()
    optimizer.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()  # all are back, and in step
    check(next(iter(model.parameters())).grad, np.full((3, 4), 2.0), 1e-5)


@pytest.mark.parametrize("compression", [hvd.Compression.none, hvd.Compression.fp16])
def test_buckets_that_are_long_enough_for_a_ring_go_on(world: World, compression: type[hvd.Compressor]) -> None:
    """A rank that has joined cuts the bucket as the others do, which have memory for it."""
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (5003, 1, 20011)]
    sgd = torch.optim.SGD(parameters, lr=0.0)
    optimizer = hvd.DistributedOptimizer(sgd, compression=compression, op=Sum, groups=1)
    for step in range(world.rank + 2):
        for n, p in enumerate(parameters):
            p.grad = (torch.arange(p.numel()) % 7 + 10.0 * n) * (world.rank + 1)
        optimizer.step()
        total = sum(rank + 1 for rank in still_there(world, step))
        for n, p in enumerate(parameters):
            check(p.grad, (np.arange(p.numel()) % 7 + 10.0 * n) * total, 0, step)
        optimizer.zero_grad()
    hvd.join()


def one_bucket_each() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Three gradients, two of which start during backward."""
    model = torch.nn.Sequential(*(torch.nn.Linear(5, 5, bias=False) for _ in range(3)))
    for p in model.parameters():
        torch.nn.init.ones_(p)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model.named_parameters(), groups=3, op=Sum
    )
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ranks: list[int], rank: int) -> None:
    optimizer.zero_grad()
    model(torch.full((1, 5), rank + 1.0)).sum().backward()
    optimizer.step()
    for p in model.parameters():
        assert p.grad is not None
        assert (p.grad == 25 * sum(r + 1 for r in ranks)).all(), (ranks, p.grad)


def test_a_plan_that_was_opened_after_a_rank_had_joined(world: World) -> None:
    model, optimizer = one_bucket_each()
    everyone = list(range(world.size))
    for _ in range(3):  # epochs
        if world.rank != world.size - 1 or world.size == 1:
            for _ in range(3):
                step(model, optimizer, everyone[:-1] or everyone, world.rank)
        hvd.join()
        for _ in range(3):
            step(model, optimizer, everyone, world.rank)


def test_plans_in_turns_after_a_rank_had_joined(world: World) -> None:
    """Its engine runs buckets of plans that it has let go, whose numbers are used again meanwhile."""
    model, optimizer = one_bucket_each()
    everyone = list(range(world.size))
    for _ in range(2):  # epochs
        step(model, optimizer, everyone, world.rank)
        if world.rank == 0:
            for frozen in [0, 1, 2] * 4:
                for number, layer in enumerate(model):
                    layer.requires_grad_(number != frozen)
                optimizer.zero_grad()
                model(torch.ones(1, 5)).sum().backward()
                optimizer.step()
                for number, p in enumerate(model.parameters()):
                    assert p.grad is None if number == frozen else bool((p.grad == 25).all()), (frozen, number, p.grad)
            model.requires_grad_(True)
        hvd.join()
    for _ in range(3):
        step(model, optimizer, everyone, world.rank)


def test_a_backward_without_a_step_before_join(world: World) -> None:
    model, optimizer = one_bucket_each()
    everyone = list(range(world.size))
    for _ in range(3):
        step(model, optimizer, everyone, world.rank)
        if world.rank == 0:  # starts buckets that no other rank's script starts
            model(torch.ones(1, 5)).sum().backward()
        hvd.join()
        for _ in range(3):
            step(model, optimizer, everyone, world.rank)


def test_an_optimizer_that_is_gone_before_the_others_are_through(world: World) -> None:
    everyone = list(range(world.size))
    for _ in range(3):
        model, optimizer = one_bucket_each()
        for _ in range(2):
            step(model, optimizer, everyone, world.rank)
        if world.rank == 0:
            for _ in range(3):
                step(model, optimizer, [0] if world.size > 1 else everyone, world.rank)
        optimizer.zero_grad()
        del model, optimizer
        gc.collect()
        hvd.join()
