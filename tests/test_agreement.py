"""Agreement by name: the order of submission does not matter, names come again, what is ready together is fused."""

import gc
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import collective
from collective import Average, Handle, Max, Sum
from harness.plugin import World
from matrix import check, combinations, make, reduced, rounding, same_on_all_ranks, transport, values  # noqa: F401

pytestmark = [pytest.mark.ranks(1, 2, 3, 4, 7), pytest.mark.usefixtures("transport")]

Case = tuple[Callable[[], Handle[Any]], Any, float]  # submits; what must come out; how far it may be off


def cases(world: World, label: str, turn: int = 0) -> dict[str, Case]:
    """Operations of every sort, by name. Shapes, roots and rows change with the turn."""
    rank, size = world.rank, world.size
    result: dict[str, Case] = {}

    def add(verb: str, x: Any, expected: Any, tolerance: float = 0, **arguments: Any) -> None:
        name = f"{label}.{len(result)}.{verb}"
        submit = getattr(collective, verb)
        result[name] = (lambda: submit(x, name=name, **arguments), expected, tolerance)

    for number, (dtype, kind, op) in enumerate(combinations()):
        shape = (3 + number % 4, 2 + turn % 3)
        x = make(values(op, shape, dtype, rank, number % 5), dtype, kind)
        verb = "allreduce_async_" if number % 2 else "allreduce_async"
        expected = reduced(op, shape, dtype, size, number % 5)
        add(verb, x, expected, rounding(op, dtype, size), op=op)
    for number, length in enumerate([5, 9_000, 40_000, 300_000]):
        x = make(values(Sum, length + turn, "float32", rank, number), "float32", "numpy")
        add("allreduce_async_", x, reduced(Sum, length + turn, "float32", size, number), op=Sum)
        root = (number + turn) % size
        x = make(values(None, length, "float32", rank, number), "float32", "torch")
        add("broadcast_async", x, values(None, length, "float32", root, number), root_rank=root)
        rows = [(length // 5 + r * 7 + turn * 3) % (length + 1) for r in range(size)]
        x = make(values(None, (rows[rank], 2), "int16", rank), "int16", "numpy")
        add("allgather_async", x, np.concatenate([values(None, (n, 2), "int16", r) for r, n in enumerate(rows)]))
    return result


def test_each_rank_submits_in_its_own_order(world: World) -> None:
    mine = cases(world, "shuffled")
    order = list(mine)
    random.Random(world.rank).shuffle(order)
    handles = {name: mine[name][0]() for name in order}
    random.Random(-world.rank).shuffle(order)  # nor does the order of waiting matter
    for name in order:
        assert handles[name].name == name
        check(handles[name].wait(), mine[name][1], mine[name][2], name)
    same_on_all_ranks(world, [handles[name].wait() for name in mine])


def test_names_come_again(world: World) -> None:
    """As they were, with other shapes and roots, and as they were once more; some of them, in another order."""
    for number, turn in enumerate([0, 0, 1, 2, 0, 0]):
        mine = cases(world, "again", turn)
        chosen = random.Random(number).sample(list(mine), len(mine) * 2 // 3)  # alike on all ranks
        random.Random(number * 100 + world.rank).shuffle(chosen)
        handles = {name: mine[name][0]() for name in chosen}
        for name in chosen:
            check(handles[name].wait(), mine[name][1], mine[name][2], f"turn {number}", name)


def test_a_name_is_free_again_once_it_is_finished(world: World) -> None:
    """For any operation, dtype or shape, while others are in flight."""
    for turn in range(20):
        other = collective.allreduce_async(np.full(1000, turn), Sum, name="other")
        length = 1 + turn // 2
        if turn % 4 == 3:
            result = collective.broadcast(np.full(length, world.rank), 0, name="reused")
            check(result, np.full(length, 0), 0, turn)
        elif turn % 4 == 2:
            check(collective.allgather(world.rank, name="reused"), np.arange(world.size), 0, turn)
        else:
            x = np.full(length, turn, ("float32", "int8")[turn % 2])
            result = collective.allreduce(x, Max, name="reused")
            assert result.dtype == x.dtype
            np.testing.assert_array_equal(result, x)
        check(other.wait(), np.full(1000, turn * world.size), 0, turn)


def test_fused_tensors_keep_apart(world: World) -> None:
    """Thousands of small tensors of a few dtypes, ready together, share buckets; odd lengths, empty ones too."""
    dtypes = ("float32", "float16", "int64")
    mine = {}
    for number in range(3000):
        shape, dtype = number % 14, dtypes[number % 3]
        mine[number] = make(values(Sum, shape, dtype, world.rank, number % 11), dtype, "numpy")
    order = list(mine)
    random.Random(world.rank).shuffle(order)
    handles = {n: collective.allreduce_async_(mine[n], Sum, name=f"fused.{n}") for n in order}
    for number, x in mine.items():
        handles[number].wait()
        dtype = dtypes[number % 3]
        check(x, reduced(Sum, number % 14, dtype, world.size, number % 11), 0, number, dtype)


def test_fused_with_different_factors_and_compression(world: World) -> None:
    """Only what is treated alike may share a bucket."""
    handles = []
    for number in range(120):
        op = (Sum, Average, Max)[number % 3]
        before, after = (1.0, 0.5)[number // 3 % 2], (1.0, 4.0)[number // 6 % 2]
        compression = (None, "fp16", "bf16")[number // 12 % 3]
        x = make(values(op, 50, "float32", world.rank, number % 5), "float32", "numpy")
        handle = collective.allreduce_async(
            x,
            op,
            name=f"mixed.{number}",
            prescale_factor=before,
            postscale_factor=after,
            compression=compression,
        )
        expected = reduced(op, 50, "float32", world.size, number % 5, before, after)
        wire = {None: "float32", "fp16": "float16", "bf16": "bfloat16"}[compression]
        handles.append((handle, expected, before * after * rounding(op, wire, world.size)))
    for number, (handle, expected, tolerance) in enumerate(handles):
        check(handle.wait(), expected, tolerance, number)


def test_unnamed_operations_meet_in_their_order(world: World) -> None:
    """Each operation counts its own unnamed calls, and names do not count."""
    first = collective.allreduce_async(np.full(3, world.rank), Max)
    named = collective.allreduce_async(np.full(4, world.rank), Max, name="no number") if world.rank % 2 else None
    sent = collective.broadcast_async(np.full(2, world.rank), 0)
    second = collective.allreduce_async(np.full(5, -world.rank), Max)
    check(second.wait(), np.zeros(5), 0)
    check(sent.wait(), np.zeros(2), 0)
    check(first.wait(), np.full(3, world.size - 1), 0)
    if named is None:
        named = collective.allreduce_async(np.full(4, world.rank), Max, name="no number")
    check(named.wait(), np.full(4, world.size - 1), 0)


def test_names_are_any_text(world: World) -> None:
    """An empty one is no name."""
    for name in ("layer.0/weight", "Größe", "two\nlines", "nul\0byte", " ", "x" * 50_000, "'quoted'", ""):
        for turn in range(2):
            assert collective.allreduce(turn, Sum, name=name) == turn * world.size, name


def test_threads_work_side_by_side(world: World) -> None:
    """Two threads wait for named operations at once; which comes first differs between ranks."""
    failures = []

    def work(label: str, seed: int) -> None:
        try:
            pauses = random.Random(seed)
            for turn in range(60):
                length = (5, 3_000, 20_000)[turn % 3]
                x = make(values(Sum, length, "float32", world.rank, turn % 5), "float32", "numpy")
                result = collective.allreduce(x, Sum, name=f"{label}.{turn % 4}")
                check(result, reduced(Sum, length, "float32", world.size, turn % 5), 0, label, turn)
                if pauses.random() < 0.2:
                    time.sleep(0.001)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"thread{n}", world.rank * 7 + n)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_several_threads_wait_for_one_handle(world: World) -> None:
    handle = collective.allgather_async(np.full(30_000, world.rank, np.int32), name="shared")
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(handle.wait())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        check(result, np.repeat(np.arange(world.size), 30_000), 0)


def test_poll_finishes_without_a_wait(world: World) -> None:
    handle = collective.allreduce_async(np.full(200_000, 1.0), Sum, name="polled")
    deadline = time.monotonic() + 20
    while not handle.poll():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    check(handle.wait(), np.full(200_000, float(world.size)), 0)
    assert handle.wait() is handle.wait()


def test_handles_may_be_dropped(world: World) -> None:
    """The operation runs all the same, and its arrays live until it has."""
    kept = []
    for number in range(60):
        x = np.full(50_000, 1.0, np.float32)
        collective.allreduce_async_(x, Sum, name=f"dropped.new.{number}")
        t = torch.full((50_000,), 1.0)
        collective.allreduce_async_(t, Sum, name=f"dropped.tensor.{number}")
        collective.allreduce_async(np.ones((300, 200)).T, Sum, name=f"dropped.copy.{number}")
        collective.allgather_async(np.ones(1000), name=f"dropped.gather.{number}")
        if number % 10 == 0:
            kept.append(x)
        del x, t
        gc.collect(0)
    # Memory that was freed too early would be written to now.
    others = [np.full(50_000, 7.0, np.float32) for _ in range(60)]
    deadline = time.monotonic() + 30
    while not all((x == world.size).all() for x in kept):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    world.comm.Barrier()
    assert all((x == 7).all() for x in others)


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_more_names_than_have_an_id(world: World) -> None:
    """Past 65536 names, operations go on, new names and old."""
    for start in range(0, 70_000, 2_000):
        arrays = [np.array([n, world.rank], np.int32) for n in range(start, start + 2_000)]
        handles = [collective.allreduce_async_(x, Max, name=f"many.{x[0]}") for x in arrays]
        for handle in handles:
            handle.wait()
        assert all(x[0] == start + i and x[1] == world.size - 1 for i, x in enumerate(arrays))
    for turn in range(3):
        for number in (0, 1, 65_000, 69_998, 69_999):
            x = np.array([number + turn, world.rank], np.int32)
            assert list(collective.allreduce(x, Sum, name=f"many.{number}")) == [
                (number + turn) * world.size,
                world.size * (world.size - 1) // 2,
            ]
