"""Counts that do not fit into 32 bits, which MPI's counts have: 2 ranks, some 7 GB of memory."""

import gc
from pathlib import Path

import numpy as np
import pytest

import collective
from collective import Sum
from harness.plugin import World

pytestmark = [pytest.mark.ranks(2), pytest.mark.slow, pytest.mark.limit(180)]

COUNT = 2**31 + 12_345
PERIOD = 251  # a prime, so that what is shifted by a chunk or a segment is seen
# The ends, the middle (where rank 1's chunk begins), around 2^31 and 2^30.
PLACES = [0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, COUNT // 2 - 1, COUNT // 2, COUNT // 2 + 1, COUNT - 1]


@pytest.fixture(autouse=True)
def _memory(world: World) -> None:
    gc.collect()
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) << 10
    if not all(world.comm.allgather(free > 8 << 30)):
        pytest.skip("needs 8 GB of free memory")


def pattern(places: np.ndarray, rank: int) -> np.ndarray:
    return (places * (rank + 1) % PERIOD % 61).astype(np.int8)


def data(rank: int, count: int = COUNT) -> np.ndarray:
    whole = np.empty((count + PERIOD - 1) // PERIOD * PERIOD, np.int8)
    whole.reshape(-1, PERIOD)[:] = pattern(np.arange(PERIOD), rank)
    return whole[:count]


def check(found: np.ndarray, expected: np.ndarray) -> None:
    """In a few blocks: a comparison of all would need as much memory again."""
    for place in PLACES:
        begin = max(0, min(place - 500, found.size - 1000))
        want = expected[np.arange(begin, begin + 1000) % PERIOD]
        np.testing.assert_array_equal(found[begin : begin + 1000], want, f"from {begin}")


def test_allreduce(world: World) -> None:
    x = data(world.rank)
    assert collective.allreduce_(x, Sum) is x
    check(x, pattern(np.arange(PERIOD), 0) + pattern(np.arange(PERIOD), 1))


def test_broadcast(world: World) -> None:
    x = data(world.rank)
    collective.broadcast_(x, 1)
    check(x, pattern(np.arange(PERIOD), 1))


def test_allgather(world: World) -> None:
    """Rank 0 has almost all."""
    few = 5
    x = data(world.rank, few if world.rank == 1 else COUNT - few)
    result = collective.allgather(x)
    assert result.shape == (COUNT,)
    np.testing.assert_array_equal(result[-few:], data(1, few))
    check(result[:-few], pattern(np.arange(PERIOD), 0))
