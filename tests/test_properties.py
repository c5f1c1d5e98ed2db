"""Random sets of named operations, submitted in another random order on each rank, against NumPy."""

import functools
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import collective
from collective import Average, Max, Min, Sum
from data import fill
from harness.plugin import World
from matrix import check, same_on_all_ranks, transport  # noqa: F401

pytestmark = [pytest.mark.ranks(2, 3), pytest.mark.limit(180)]

KINDS = ("allreduce", "broadcast", "allgather", "alltoall", "reducescatter", "gather", "scatter", "reduce")
MOST_SALT = 50

operation = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "rows": st.sampled_from([0, 1, 2, 5, 33, 4097, 30_000]),
        "dtype": st.sampled_from(["float32", "float64", "int32"]),
        "op": st.sampled_from([Average, Sum, Min, Max]),
        "root": st.integers(0, 100),
        "salt": st.integers(0, MOST_SALT),
    }
)


@functools.cache
def numbers(dtype: str, rank: int) -> Any:
    """What a rank contributes is cut out of these: making it anew takes longer than most operations."""
    return fill(200_000 + MOST_SALT, dtype, rank)


def contribution(o: dict[str, Any], rank: int, size: int) -> Any:
    rows = o["rows"]
    if o["kind"] in ("allgather", "gather"):
        rows = (rows + rank) % 50
    elif o["kind"] == "alltoall":
        rows = rows // size * size
    return numbers(o["dtype"], rank)[o["salt"] : o["salt"] + rows]


def submit(o: dict[str, Any], name: str, world: World) -> Any:
    x = contribution(o, world.rank, world.size)
    root = o["root"] % world.size
    match o["kind"]:
        case "allreduce":
            return collective.allreduce_async(x, o["op"], name=name)
        case "reducescatter":
            return collective.reducescatter_async(x, o["op"], name=name)
        case "reduce":
            return collective.reduce_async(x, root, o["op"], name=name)
        case "broadcast":
            return collective.broadcast_async(x, root, name=name)
        case "allgather":
            return collective.allgather_async(x, name=name)
        case "alltoall":
            return collective.alltoall_async(x, name=name)
        case "gather":
            return collective.gather_async(x, root, name=name)
        case "scatter":
            return collective.scatter_async(x, root, name=name)


def expected(o: dict[str, Any], world: World) -> Any:
    each = [contribution(o, rank, world.size) for rank in range(world.size)]
    root = o["root"] % world.size
    if o["kind"] in ("allreduce", "reducescatter", "reduce"):
        combine = {Min: np.min, Max: np.max}.get(o["op"], np.sum)
        total = combine(np.stack(each).astype("float64"), 0)
        if o["op"] is Average:
            total /= world.size
        if o["dtype"] == "int32":
            total = np.trunc(total)
        if o["kind"] == "reduce":
            return total if world.rank == root else None
        return total if o["kind"] == "allreduce" else np.array_split(total, world.size)[world.rank]
    if o["kind"] == "alltoall":
        return np.concatenate([np.split(x, world.size)[world.rank] for x in each])
    if o["kind"] == "broadcast":
        return each[root]
    if o["kind"] == "scatter":
        return np.array_split(each[root], world.size)[world.rank]
    return np.concatenate(each) if o["kind"] == "allgather" or world.rank == root else None


def wait_and_check(o: dict[str, Any], handle: Any, world: World) -> Any:
    result = handle.wait()
    wanted = expected(o, world)
    if o["kind"] == "alltoall":
        result = result[0]
    if wanted is None:
        assert result is None, o
    else:
        check(result, wanted, 1e-5 if o["op"] is Average else 0, o)
    return result


# Derandomised: all ranks must draw the same examples.
@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(operations=st.lists(operation, min_size=1, max_size=12), order=st.integers(0, 1000))
def test_any_order_of_submission_gives_numpys_results(
    world: World, operations: list[dict[str, Any]], order: int
) -> None:
    mine = list(enumerate(operations))
    random.Random(order * 10 + world.rank).shuffle(mine)
    handles = {number: submit(o, f"property.{number}", world) for number, o in mine}
    for number, o in enumerate(operations):
        wait_and_check(o, handles[number], world)


@pytest.mark.slow
@pytest.mark.ranks(4)
@pytest.mark.usefixtures("transport")
def test_ten_thousand_operations_of_all_kinds(world: World) -> None:
    """Dozens in flight, in another order on each rank, and a barrier now and then."""
    agreed, own = random.Random(7), random.Random(world.rank)
    summed = []
    for batch in range(250):
        operations = [
            {
                "kind": agreed.choice(KINDS),
                "rows": agreed.choice([0, 1, 2, 5, 33, 700, 4097] if number % 10 else [30_000, 200_000]),
                "dtype": agreed.choice(["float32", "float64", "int32"]),
                "op": agreed.choice([Average, Sum, Min, Max]),
                "root": agreed.randrange(4),
                "salt": agreed.randrange(MOST_SALT),
            }
            for number in range(40)
        ]
        mine = list(enumerate(operations))
        own.shuffle(mine)
        handles = {number: submit(o, f"mixed.{number}", world) for number, o in mine}
        for number, o in own.sample(mine, len(mine)):
            result = wait_and_check(o, handles[number], world)
            if o["kind"] == "allreduce" and batch % 10 == 0:
                summed.append((number + 40 * batch, result))
        if batch % 25 == 0:
            collective.barrier()
    same_on_all_ranks(world, (result for _, result in sorted(summed, key=lambda pair: pair[0])))
