"""Sparse gradients: gathered as they are, or made dense."""

from typing import Any

import numpy as np
import pytest
import torch

import collective.torch as hvd
from harness.plugin import World
from matrix import check

pytestmark = pytest.mark.ranks(1, 2, 3)


def sparse(rank: int) -> torch.Tensor:
    """Rows rank and 3, the latter twice."""
    return torch.sparse_coo_tensor([[rank, 3, 3]], torch.ones(3, 2) * (rank + 1), (6, 2), check_invariants=True)


def dense_sum(size: int) -> np.ndarray:
    return sum(sparse(rank).to_dense() for rank in range(size)).numpy()  # type: ignore[union-attr]


def test_sparse_allreduce(world: World) -> None:
    finish = hvd.sparse_allreduce_async(sparse(world.rank), name="s", op=hvd.Sum)
    result = finish()
    assert result.is_sparse
    check(result.to_dense(), dense_sum(world.size), 0)
    mean = hvd.synchronize(hvd.sparse_allreduce_async(sparse(world.rank)))
    check(mean.to_dense(), dense_sum(world.size) / world.size, 1e-6)
    with pytest.raises(ValueError, match="Average or Sum"):
        hvd.sparse_allreduce_async(sparse(world.rank), op=hvd.Max)


@pytest.mark.parametrize("as_dense", [False, True])
def test_an_embedding_trains_as_with_dense_gradients(world: World, as_dense: bool) -> None:
    tables = []
    for is_sparse in (True, False):
        table = torch.nn.Embedding(12, 3, sparse=is_sparse, dtype=torch.float64)
        linear = torch.nn.Linear(3, 1, dtype=torch.float64)
        for p in (*table.parameters(), *linear.parameters()):
            torch.nn.init.constant_(p, 0.5)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([*table.parameters(), *linear.parameters()], lr=0.1),
            gradient_predivide_factor=2.0,
            sparse_as_dense=as_dense,
        )
        for step in range(4):
            optimizer.zero_grad()
            if step != 1 or world.rank > 0:  # once, rank 0 has no gradient at all
                words = torch.tensor([world.rank, (step + world.rank) % 12, 7])
                linear(table(words)).square().sum().backward()
            optimizer.step()
        if world.size > 1:
            assert table.weight.grad is not None
            assert table.weight.grad.is_sparse == (is_sparse and not as_dense)
        tables.append(table.weight.detach())
    check(tables[0], tables[1].numpy(), 1e-12)


def test_an_optimizer_that_takes_sparse_gradients_alone(world: World) -> None:
    """It gets sparse ones, although they have travelled as dense ones."""
    options: list[dict[str, Any]] = [{}, {"sparse_as_dense": True}, {"compression": Identity}]
    results = []
    for given in options:
        table = torch.nn.Embedding(10, 3, sparse=True, dtype=torch.float64)
        torch.nn.init.constant_(table.weight, 0.5)
        optimizer = hvd.DistributedOptimizer(torch.optim.SparseAdam(list(table.parameters())), **given)
        for step in range(4):
            optimizer.zero_grad()
            if step != 2 or world.rank > 0:
                table(torch.tensor([world.rank, step])).square().sum().backward()
            optimizer.step()
            assert table.weight.grad is None or table.weight.grad.is_sparse
        results.append(table.weight.detach())
    for result in results[1:]:
        check(result, results[0].numpy(), 1e-12)


def test_sparse_as_dense_with_a_compressor(world: World) -> None:
    """For an optimizer that takes dense gradients alone, also where nothing is reduced."""
    table = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(table.parameters()), sparse_as_dense=True, compression=Identity
    )
    table(torch.tensor([world.rank])).sum().backward()
    optimizer.step()
    assert not table.weight.grad.is_sparse  # type: ignore[union-attr]


class Identity(hvd.Compressor):
    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return tensor
