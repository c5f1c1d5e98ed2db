"""Adasum against a reference written from the paper, arXiv 2006.02924."""

import numpy as np
import pytest
import torch

import collective
import collective.torch as hvd
from collective import Adasum
from harness.plugin import World
from matrix import check, make, numbers, same_on_all_ranks

pytestmark = pytest.mark.ranks(1, 2, 3, 4, 7)


def pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What a and b have in common counts once."""
    dot, aa, bb = (float((x * y).sum()) for x, y in ((a, b), (a, a), (b, b)))
    return (1 - dot / (2 * aa) if aa else 1) * a + (1 - dot / (2 * bb) if bb else 1) * b


def adasum(vectors: list[np.ndarray]) -> np.ndarray:
    """Pairs, pairs of pairs; ranks beyond a power of two are first combined with their neighbour."""
    power = 1 << (len(vectors).bit_length() - 1)
    extra = len(vectors) - power
    level = [pair(vectors[2 * i], vectors[2 * i + 1]) for i in range(extra)] + vectors[2 * extra :]
    while len(level) > 1:
        level = [pair(level[i], level[i + 1]) for i in range(0, len(level), 2)]
    return level[0]


def vector(rank: int, count: int, salt: int) -> np.ndarray:
    return np.random.default_rng([rank, count, salt]).standard_normal(count) + 0.3


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-5), ("float16", 0.02), ("bfloat16", 0.2)]
)
def test_matches_the_reference(world: World, dtype: str, bound: float) -> None:
    for count in (1, 2, 1000, 300_000):
        each = [numbers(make(vector(rank, count, 0), dtype, "torch")) for rank in range(world.size)]
        result = collective.allreduce(make(each[world.rank], dtype, "torch"), Adasum, name=f"adasum.{count}")
        assert np.abs(numbers(result) - adasum(each)).max() <= bound * np.abs(adasum(each)).max(), (count, dtype)
        same_on_all_ranks(world, [result])


def test_orthogonal_vectors_are_added_and_equal_ones_kept(world: World) -> None:
    unit = np.eye(world.size)[world.rank]
    check(collective.allreduce(unit, Adasum), np.ones(world.size), 0)
    check(collective.allreduce(np.arange(5.0), Adasum), np.arange(5.0), 1e-12)
    check(collective.allreduce(np.zeros(5), Adasum), np.zeros(5), 0)
    check(collective.allreduce(np.arange(5.0), Adasum, prescale_factor=2, postscale_factor=0.5), np.arange(5.0), 1e-12)


def test_tensors_submitted_together_are_combined_each_by_itself(world: World) -> None:
    handles = [
        collective.allreduce_async(vector(world.rank, count, 1), Adasum, name=f"t{count}") for count in (3, 50, 20_000)
    ]
    for count, handle in zip((3, 50, 20_000), handles, strict=True):
        check(handle.wait(), adasum([vector(rank, count, 1) for rank in range(world.size)]), 1e-9)


@pytest.mark.ranks(3)
def test_on_a_process_set(world: World) -> None:
    some = collective.add_process_set([0, 2])
    if some.included():
        result = collective.allreduce(vector(world.rank, 10, 2), Adasum, process_set=some)
        check(result, adasum([vector(0, 10, 2), vector(2, 10, 2)]), 1e-12)
    collective.remove_process_set(some)


@pytest.mark.ranks(1, 2, 3, 4)  # not 7, which import torch's compiler for this test alone
def test_the_optimizer_combines_what_the_steps_changed(world: World) -> None:
    p = torch.nn.Parameter(torch.ones(8, dtype=torch.float64))
    optimizer = hvd.DistributedOptimizer(torch.optim.Adam([p], lr=0.1), op=hvd.Adasum)
    expected = np.ones(8)
    alone = [torch.nn.Parameter(torch.ones(8, dtype=torch.float64)) for _ in range(world.size)]
    steps = [torch.optim.Adam([q], lr=0.1) for q in alone]
    for turn in range(3):
        p.grad = torch.from_numpy(vector(world.rank, 8, turn))
        optimizer.step()
        deltas = []
        for rank in range(world.size):
            with torch.no_grad():
                alone[rank].copy_(torch.from_numpy(expected))
            alone[rank].grad = torch.from_numpy(vector(rank, 8, turn))
            steps[rank].step()
            deltas.append(numbers(alone[rank].detach()) - expected)
        expected = expected + adasum(deltas)
        check(p.detach(), expected, 1e-9, turn)
    with pytest.raises(collective.InvalidArgumentError, match="skip_synchronize"), optimizer.skip_synchronize():
        pass
