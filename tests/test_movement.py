"""alltoall, gather, scatter, send and recv: every dtype and array kind, rows that differ."""

import numpy as np
import pytest
import torch

import collective
from harness.plugin import World
from matrix import DTYPES, Values, check, kinds, make, transport, values  # noqa: F401

pytestmark = [pytest.mark.ranks(1, 2, 3, 4), pytest.mark.usefixtures("transport")]

ROW = (3,)


def rows(count: int, dtype: str, rank: int) -> Values:
    return values(None, (count, *ROW), dtype, rank)


def split_counts(size: int, rank: int) -> list[int]:
    """Rows from `rank` to each rank: uneven, some none, none alike between two ranks."""
    return [(rank * 2 + peer * 3) % 5 for peer in range(size)]


def test_alltoall_of_every_dtype_with_uneven_splits(world: World) -> None:
    for dtype in DTYPES:
        for kind in kinds(dtype):
            mine = split_counts(world.size, world.rank)
            x = make(rows(sum(mine), dtype, world.rank), dtype, kind)
            result, received = collective.alltoall(x, mine, name=f"alltoall.{dtype}.{kind}")
            parts = []
            for rank in range(world.size):
                theirs = split_counts(world.size, rank)
                first = sum(theirs[: world.rank])
                parts.append(rows(sum(theirs), dtype, rank)[first : first + theirs[world.rank]])
            assert received == [len(part) for part in parts]
            assert type(result) is type(x)
            check(result, np.concatenate(parts), 0, dtype, kind)


def test_alltoall_in_equal_parts_and_large(world: World) -> None:
    x = np.arange(world.size * 300_000, dtype=np.float32) + 7 * world.rank
    result, received = collective.alltoall(x)
    assert received == [300_000] * world.size
    part = np.arange(300_000, dtype=np.float32) + 300_000 * world.rank
    check(result, np.concatenate([part + 7 * rank for rank in range(world.size)]), 0)


def test_gather_and_scatter_to_and_from_each_root(world: World) -> None:
    for root in range(world.size):
        for dtype in DTYPES:
            for kind in kinds(dtype):
                x = make(rows(world.rank + 1, dtype, world.rank), dtype, kind)
                result = collective.gather(x, root, name=f"gather.{dtype}.{kind}")
                if world.rank == root:
                    each = [rows(rank + 1, dtype, rank) for rank in range(world.size)]
                    check(result, np.concatenate(each), 0, dtype, kind)
                else:
                    assert result is None
                whole = rows(2 * world.size + 1, dtype, root)
                given = whole if world.rank == root else whole[:0]
                part = collective.scatter(make(given, dtype, kind), root, name=f"scatter.{dtype}.{kind}")
                check(part, np.array_split(whole, world.size)[world.rank], 0, dtype, kind)


@pytest.mark.ranks(2, 3, 4)
def test_send_and_recv_round_the_ring_keep_their_order(world: World) -> None:
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    counts = [0, 1, 1000, 400_000, 5]  # around the segment of 1 MiB
    sends = [
        collective.send_async(torch.full((n,), world.rank * 10.0 + i), right, tag=i % 2) for i, n in enumerate(counts)
    ]
    receives = [collective.recv_async(torch.empty(n), left, tag=i % 2) for i, n in enumerate(counts)]
    for i, handle in enumerate(receives):
        check(handle.wait(), np.full(counts[i], left * 10.0 + i), 0, i)
    for handle in sends:
        handle.wait()


@pytest.mark.ranks(1)
def test_one_rank_has_nobody_to_send_to(world: World) -> None:
    with pytest.raises(collective.InvalidArgumentError, match="not another rank"):
        collective.send(np.ones(1), world.rank)


@pytest.mark.ranks(2, 3, 4)
def test_a_pair_that_does_not_fit_fails_on_both_and_on_nobody_else(world: World) -> None:
    def exchange(received: int) -> None:
        if world.rank == 0:
            collective.send(np.ones(3), 1)
        else:
            check(collective.recv(np.zeros(received), 0), np.ones(3), 0)

    if world.rank < 2:
        with pytest.raises(collective.MismatchError, match=r"shape differs: \(3,\) on rank 0; \(4,\) on rank 1"):
            exchange(4)
        exchange(3)
    collective.barrier()


def test_bad_arguments(world: World) -> None:
    for splits in ([1] * (world.size + 1), [-1] + [1] * (world.size - 1), [2] * world.size):
        with pytest.raises(collective.InvalidArgumentError, match="splits"):
            collective.alltoall(np.ones(world.size), splits)
    with pytest.raises(collective.InvalidArgumentError, match="root_rank"):
        collective.scatter(np.ones(1), world.size)
    check(collective.allreduce(np.ones(2), collective.Sum), np.full(2, world.size), 0)


@pytest.mark.ranks(2, 3, 4)
def test_bad_arguments_among_several(world: World) -> None:
    with pytest.raises(collective.InvalidArgumentError, match="do not divide evenly"):
        collective.alltoall(np.ones(world.size + 1))
    with pytest.raises(collective.InvalidArgumentError, match="tag"):
        collective.send(np.ones(1), (world.rank + 1) % world.size, tag=1024)
    with pytest.raises(collective.MismatchError, match="root_rank differs"):
        collective.gather(np.ones(1), min(world.rank, 1), name="roots")
    with pytest.raises(collective.MismatchError, match="shape differs"):
        collective.alltoall(np.ones((world.size, 2 + (world.rank == 0))), name="trailing")
    check(collective.allreduce(np.ones(2), collective.Sum), np.full(2, world.size), 0)
