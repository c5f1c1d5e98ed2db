"""Lengths at which the algorithms change their ways: the ring's threshold, chunks, segments, depth; fusion or not."""

from typing import Any

import numpy as np
import pytest

import collective
from collective import Average, Max, Op, Sum, _core
from harness.plugin import World
from matrix import check, itemsize, make, reduced, rounding, same_on_all_ranks, transport, values  # noqa: F401

pytestmark = [pytest.mark.ranks(1, 2, 3, 4, 7), pytest.mark.usefixtures("transport")]

THRESHOLDS = {what: nbytes for what, nbytes, _, _ in _core.thresholds()}
RING_FROM = THRESHOLDS["allreduce in messages"]
CHAIN_FROM = THRESHOLDS["broadcast in messages"]
SEGMENT = 128 << 10  # bytes
DEPTH = 4  # segments in flight
NODE_CHUNK = 256 << 10  # bytes at least, that a rank puts into shared memory at a time
FUSION_THRESHOLD = 8 << 20  # bytes: from here a tensor goes alone


def around(nbytes: int, dtype: str, size: int = 1) -> list[int]:
    """Lengths on both sides of nbytes; with `size` chunks that are equal, and one longer or shorter than the rest."""
    count = nbytes // itemsize(dtype)
    return [count - 1, count, count + 1, *([count + size - 1] if size > 2 else [])]


def edges(dtype: str, size: int) -> list[int]:
    """Where an all-reduce of this dtype changes its ways."""
    ends = [around(RING_FROM, dtype, size), around(size * SEGMENT, dtype, size)]
    if dtype == "float32":
        ends += [around(size * SEGMENT * chunks, dtype, size) for chunks in (2, DEPTH, DEPTH + 1)]
        ends += [around(NODE_CHUNK * chunks, dtype) for chunks in (1, 3, 4)]
        ends += [around(FUSION_THRESHOLD, dtype)]
    return sorted({length for end in ends for length in end})


def reduce_and_check(world: World, op: Op, dtype: str, length: int, in_place: bool) -> Any:
    x = make(values(op, length, dtype, world.rank), dtype, "torch" if dtype == "bfloat16" else "numpy")
    result = (collective.allreduce_ if in_place else collective.allreduce)(x, op)
    expected = reduced(op, length, dtype, world.size)
    check(result, expected, rounding(op, dtype, world.size), dtype, op, length, in_place)
    return result


@pytest.mark.parametrize("dtype", ["uint8", "int16", "bfloat16", "float32", "complex128"])
def test_allreduce_on_both_sides_of_each_threshold(world: World, dtype: str) -> None:
    results = []
    for number, length in enumerate(edges(dtype, world.size)):
        op = (Sum, Average)[number // 2 % 2]
        results.append(reduce_and_check(world, op, dtype, length, number % 2 == 0))
    same_on_all_ranks(world, results)


def test_compressed_allreduce_on_both_sides_of_each_threshold(world: World) -> None:
    for length in edges("float16", world.size):  # of the wire
        x = values(Sum, length, "float32", world.rank).astype("float32")
        result = collective.allreduce_(x, Sum, compression="bf16")
        check(result, reduced(Sum, length, "float32", world.size), 0, length)


def test_many_rings_at_once(world: World) -> None:
    """Several rings, long and short, whose messages cross; each rank starts them in its own order."""
    lengths = [around(world.size * SEGMENT * chunks, "float32")[chunks % 3] for chunks in range(1, 7)] * 3
    order = np.random.default_rng(world.rank).permutation(len(lengths))
    inputs = {n: values(Max, lengths[n], "float32", world.rank, n % 5).astype("float32") for n in order}
    handles = {n: collective.allreduce_async_(inputs[n], Max, name=f"ring.{n}") for n in order}
    for n, length in enumerate(lengths):
        check(handles[n].wait(), reduced(Max, length, "float32", world.size, n % 5), 0, n, length)


def test_broadcast_on_both_sides_of_each_threshold(world: World) -> None:
    nbytes = {n + d for n in (CHAIN_FROM, SEGMENT, 2 * SEGMENT, DEPTH * SEGMENT, 9 * SEGMENT) for d in (-1, 0, 1)}
    for number, length in enumerate(sorted(nbytes)):
        for root in {0, world.size - 1, number % world.size}:
            x = values(None, length, "uint8", world.rank, number % 3).astype("uint8")
            expected = values(None, length, "uint8", root, number % 3)
            check(collective.broadcast_(x, root), expected, 0, length, root)


def test_allgather_of_uneven_chunks(world: World) -> None:
    """Chunks of no, one and several segments in one ring, at every place of it."""
    rows = [0, 1, SEGMENT - 1, 0, SEGMENT, SEGMENT + 1, 5 * SEGMENT + 3, 17]
    for turn in range(len(rows)):
        mine = [rows[(rank + turn) % len(rows)] for rank in range(world.size)]
        x = values(None, mine[world.rank], "int8", world.rank).astype("int8")
        expected = [values(None, length, "int8", rank) for rank, length in enumerate(mine)]
        check(collective.allgather(x), np.concatenate(expected), 0, turn)
    nothing = collective.allgather(np.empty((0, 3), np.float32))
    assert nothing.shape == (0, 3)
    for owner in range(world.size):
        x = np.full((5 * SEGMENT if world.rank == owner else 0), owner, np.int8)
        check(collective.allgather(x), np.full(5 * SEGMENT, owner), 0, "all from", owner)
