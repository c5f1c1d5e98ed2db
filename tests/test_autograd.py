"""Gradients of the collectives against finite sums worked out by hand: L = sum over ranks of weight_r . output_r."""

import numpy as np
import pytest
import torch

import collective.torch as hvd
from matrix import check
from mpi_plugin import World

pytestmark = pytest.mark.ranks(1, 2, 3)


def weight(rank: int, *shape: int) -> torch.Tensor:
    return (torch.arange(1.0, 1 + int(np.prod(shape))) * (rank + 2)).reshape(shape).double()


def leaf(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float64, requires_grad=True)


def test_reducescatter(world: World) -> None:
    rows = [len(part) for part in np.array_split(np.arange(5), world.size)]
    for op, divisor in ((hvd.Sum, 1), (hvd.Average, world.size)):
        x = leaf(5, 2)
        y = hvd.reducescatter(x, op=op, prescale_factor=3.0)
        (y * weight(world.rank, *y.shape)).sum().backward()
        expected = torch.cat([weight(rank, rows[rank], 2) for rank in range(world.size)]) * 3 / divisor
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
    check(xs[0].grad, total[first : first + world.rank + 1].numpy(), 0)  # type: ignore[index]
