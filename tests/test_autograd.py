"""Gradients of the collectives against sums worked out by hand, for the losses weight_r . output_r of the ranks."""

import numpy as np
import pytest
import torch

import collective.torch as hvd
from harness.plugin import World
from matrix import check

pytestmark = pytest.mark.ranks(1, 2, 3)


def weight(rank: int, *shape: int) -> torch.Tensor:
    return (torch.arange(1.0, 1 + int(np.prod(shape))) * (rank + 2)).reshape(shape).double()


def leaf(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float64, requires_grad=True)


def test_reducescatter(world: World) -> None:
    rows = [len(part) for part in np.array_split(np.arange(5), world.size)]
    for op, factor in ((hvd.Sum, world.size), (hvd.Average, 1)):
        x = leaf(5, 2)
        y = hvd.reducescatter(x, op=op, prescale_factor=3.0)
        (y * weight(world.rank, *y.shape)).sum().backward()
        expected = torch.cat([weight(rank, rows[rank], 2) for rank in range(world.size)]) * 3 * factor
        check(x.grad, expected.numpy(), 1e-12, op)
    y = hvd.reducescatter(leaf(5), op=hvd.Max)
    with pytest.raises(NotImplementedError, match="Max has no gradient"):
        y.sum().backward()


def test_alltoall(world: World) -> None:
    splits = [rank + 1 for rank in range(world.size)]
    x = leaf(sum(splits), 2)
    y, received = hvd.alltoall(x, splits=torch.tensor(splits))
    assert received.tolist() == [world.rank + 1] * world.size
    (y * weight(world.rank, *y.shape)).sum().backward()
    each = [weight(rank, (rank + 1) * world.size, 2) for rank in range(world.size)]
    mine = [w[world.rank * (rank + 1) : (world.rank + 1) * (rank + 1)] for rank, w in enumerate(each)]
    check(x.grad, torch.cat(mine).numpy(), 0)


def test_grouped_forms(world: World) -> None:
    xs = [leaf(2), leaf(3)]
    for y in hvd.grouped_allreduce(xs, op=hvd.Sum):
        (y * weight(world.rank, *y.shape)).sum().backward(retain_graph=True)
    for x in xs:
        check(x.grad, sum(weight(rank, *x.shape) for rank in range(world.size)).numpy(), 0)  # type: ignore[union-attr]
    xs = [leaf(world.rank + 1), leaf(2)]
    sum((y * weight(world.rank, *y.shape)).sum() for y in hvd.grouped_allgather(xs)).backward()  # type: ignore[union-attr]
    total = sum(weight(rank, sum(range(1, world.size + 1))) for rank in range(world.size))
    first = sum(range(1, world.rank + 1))
    mean = total[first : first + world.rank + 1] / world.size  # type: ignore[index]
    check(xs[0].grad, mean.numpy(), 1e-12)


@pytest.mark.ranks(3)
def test_a_process_set_scales_by_its_own_size(world: World) -> None:
    some = hvd.add_process_set([0, 2])
    if some.included():
        first = 2 * some.rank()
        x = leaf(2)
        y = hvd.allgather(x, process_set=some)
        (y * weight(world.rank, 4)).sum().backward()
        check(x.grad, ((weight(0, 4) + weight(2, 4)) / 2)[first : first + 2].numpy(), 1e-12)
        x = leaf(2)
        (hvd.broadcast(x, 2, process_set=some) * weight(world.rank, 2)).sum().backward()
        check(x.grad, ((weight(0, 2) + weight(2, 2)) / 2 if world.rank == 2 else torch.zeros(2)).numpy(), 1e-12)
        x = leaf(2)
        (hvd.reducescatter(x, op=hvd.Sum, process_set=some) * weight(world.rank, 1)).sum().backward()
        check(x.grad, (2 * torch.cat([weight(0, 1), weight(2, 1)])).numpy(), 0)
    hvd.remove_process_set(some)


def test_a_loss_over_gathered_features(world: World) -> None:
    """The ranks' gradients of a contrastive loss add up to that of one process with the whole batch."""
    features = torch.arange(1.0, 1 + 2 * world.size, dtype=torch.float64).reshape(-1, 1)
    w, alone = leaf(1), leaf(1)
    everything = hvd.allgather(features[2 * world.rank : 2 * world.rank + 2] * w)
    mine = everything[2 * world.rank : 2 * world.rank + 2]
    (mine @ everything.t()).logsumexp(1).mean().backward()
    every = features * alone
    (every @ every.t()).logsumexp(1).mean().backward()
    check(hvd.allreduce(w.grad, op=hvd.Sum), alone.grad.numpy(), 1e-12)  # type: ignore[union-attr]
