"""allreduce: every dtype, operator and array kind, factors, array layouts; see also test_ring.py."""

import random
import time
from typing import Any

import numpy as np
import pytest
import torch

import collective
import collective.torch as hvd
from collective import Average, Max, Min, Op, Product, Sum
from data import fill
from harness.plugin import World
from matrix import (
    COMPLEX,
    FLOATS,
    PRECISION,
    check,
    combinations,
    kinds,
    lengths,
    make,
    operators,
    reduced,
    rounding,
    same_on_all_ranks,
    transport,  # noqa: F401
    values,
)

pytestmark = [pytest.mark.ranks(1, 2, 3, 4, 7), pytest.mark.usefixtures("transport")]


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
def test_every_dtype_kind_and_operator(world: World, in_place: bool) -> None:
    rank, size = world.rank, world.size
    shapes = [*lengths(size), (), (2, 3, 5), (4, 0, 2)]
    cases = [(*combination, shape) for combination in combinations() for shape in shapes]
    submit = collective.allreduce_async_ if in_place else collective.allreduce_async
    running = []
    for number, (dtype, kind, op, shape) in enumerate(cases):
        x = make(values(op, shape, dtype, rank, number % 5), dtype, kind)
        running.append((x, submit(x, op, name=f"every.{in_place}.{number}")))
    results = []
    for number, ((dtype, kind, op, shape), (x, handle)) in enumerate(zip(cases, running, strict=True)):
        result = handle.wait()
        assert type(result) is type(x)
        assert result.dtype == x.dtype
        if in_place:
            assert result is x
        else:
            check(x, values(op, shape, dtype, rank, number % 5), 0, "input changed", dtype, kind, op, shape)
        expected = reduced(op, shape, dtype, size, number % 5)
        check(result, expected, rounding(op, dtype, size), dtype, kind, op, shape)
        results.append(result)
    same_on_all_ranks(world, results)


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
def test_one_at_a_time_with_factors(world: World, in_place: bool) -> None:
    """Powers of two are exact in every float; integers are truncated toward zero, the average too."""
    call: Any = collective.allreduce_ if in_place else collective.allreduce
    for number, (dtype, kind, op) in enumerate(combinations()):
        for before, after in [(1.0, 1.0), (0.5, 1.0), (1.0, 1.5), (0.5, 4.0), (2.0, 0.25), (0.0, 1.0)]:
            if dtype == "bool" and not before == after == 1.0:
                continue
            x = make(values(op, 33, dtype, world.rank, number % 5), dtype, kind)
            result = call(x, op, prescale_factor=before, postscale_factor=after)
            expected = reduced(op, 33, dtype, world.size, number % 5, before, after)
            tolerance = before * after * rounding(op, dtype, world.size)
            check(result, expected, tolerance, dtype, kind, op, before, after)
            if not in_place:
                check(x, values(op, 33, dtype, world.rank, number % 5), 0, "input changed", dtype, kind, op)


def test_negative_factor_comes_before_the_operator(world: World) -> None:
    x = values(Max, 33, "int32", world.rank)
    expected = -reduced(Min, 33, "int32", world.size)
    check(collective.allreduce(x.astype("int32"), Max, prescale_factor=-1), expected, 0)
    check(collective.allreduce(x.astype("int32"), Min, postscale_factor=-1), expected, 0)


def test_integers_wrap_in_sums_and_saturate_in_factors(world: World) -> None:
    x = np.array([100, -100, 127], np.int8)
    total = (x.astype(int) * world.size).astype(np.int8)
    np.testing.assert_array_equal(collective.allreduce(x, Sum), total)
    np.testing.assert_array_equal(collective.allreduce(x, Max, postscale_factor=2), [127, -128, 127])
    big = np.array([2**62, -(2**62) - 1], np.int64)
    np.testing.assert_array_equal(collective.allreduce(big, Min), big)  # not through float64


def test_compression(world: World) -> None:
    """Sums are rounded to the wire's type at every rank at most."""
    cases = [(d, k, op) for d in ("float32", "float64") for k in kinds(d) for op in operators(d)]
    results = []
    for compression, wire in (("fp16", "float16"), ("bf16", "bfloat16")):
        for number, (dtype, kind, op) in enumerate(cases):
            for length in (0, 1, world.size + 1, 33, 20_001):
                each = np.stack(
                    [np.random.default_rng([rank, number]).uniform(0.5, 2, length) for rank in range(world.size)]
                ).astype(dtype)
                in_place = number % 2 == 1
                call: Any = collective.allreduce_ if in_place else collective.allreduce
                x = make(each[world.rank], dtype, kind)
                result = call(x, op, compression=compression)
                assert result.dtype == x.dtype
                exact = {Average: each.mean, Sum: each.sum, Min: each.min, Max: each.max, Product: each.prod}[op]
                expected = exact(0, dtype="float64") if op not in (Min, Max) else exact(0).astype("float64")
                bound = expected * 2 * (world.size + 1) * 2.0 ** -PRECISION[wire]
                check(result, expected, bound, compression, dtype, kind, op, length)
                results.append(result)
    same_on_all_ranks(world, results)


def test_compression_leaves_other_dtypes_alone(world: World) -> None:
    for dtype, kind, op in combinations():
        if dtype in ("float32", "float64"):
            continue
        x = make(values(op, 33, dtype, world.rank), dtype, kind)
        expected = reduced(op, 33, dtype, world.size)
        tolerance = rounding(op, dtype, world.size)
        check(collective.allreduce(x, op, compression="bf16"), expected, tolerance, dtype, kind, op)


def test_averages_near_the_largest_float16_do_not_overflow(world: World) -> None:
    for length in (5, 20_000):
        number = 60_000.0 + 32 * ((np.arange(length) + world.rank) % 7)
        expected = np.mean([60_000.0 + 32 * ((np.arange(length) + r) % 7) for r in range(world.size)], 0)
        bound = 65_504 * (world.size + 1) * 2.0**-11
        for dtype, compression in (("float16", None), ("float32", "fp16"), ("float64", "fp16")):
            for kind in kinds(dtype):
                x = make(number, dtype, kind)
                result = collective.allreduce(x, compression=compression)
                check(result, expected, bound, dtype, compression, kind, length)
                result = collective.allreduce_(x, prescale_factor=0.5, postscale_factor=2, compression=compression)
                check(result, expected, bound, dtype, compression, kind, length, "in place, with factors")


def test_same_bits_on_all_ranks_and_in_every_run(world: World) -> None:
    def run() -> str:
        results = []
        for dtype in (*FLOATS, *COMPLEX):
            for length in (9, 1_003, 40_001):
                x = np.random.default_rng([world.rank, length]).standard_normal(length)
                for op in (Sum, Average):
                    for compression in (None, "fp16", "bf16") if dtype == "float32" else (None,):
                        array = make(x, dtype, kinds(dtype)[-1])
                        results.append(collective.allreduce(array, op, compression=compression))
        return same_on_all_ranks(world, results)

    assert run() == run()


@pytest.mark.ranks(3, 4, 7)
def test_fusion_does_not_change_a_bit(world: World) -> None:
    """Which operations share a bucket depends on time; the order in which an element is added must not."""
    lengths = [1, 5, 33, 700, 1500, 3000, 3001, 4000, 4095, 4096, 4097, 5000, 9001, 16_384, 30_000, 70_001]
    lengths += [2500, 2501, 3500, 3999]  # of short ones more than 16 KiB: together they are no short message
    inputs = [np.random.default_rng([world.rank, n]).standard_normal(n).astype("float32") for n in lengths]
    numbers = list(range(len(lengths)))

    def apart(turn: int) -> list[Any]:
        dice, order = random.Random(10 * turn + world.rank), list(numbers)
        dice.shuffle(order)
        handles = {}
        for number in order:
            time.sleep(dice.choice((0, 0, 0.001, 0.003)))
            handles[number] = collective.allreduce_async(inputs[number], Average, name=f"apart.{number}")
        return [handles[number].wait() for number in numbers]

    def at_once(turn: int) -> list[Any]:
        collective.barrier()
        time.sleep(0.02 * (world.rank == turn % world.size))
        return collective.grouped_allreduce(inputs, Average, name="at once")

    alone = [collective.allreduce(x, Average, name=f"alone.{number}") for number, x in enumerate(inputs)]
    same_on_all_ranks(world, alone)
    for turn in range(3):
        for way in (apart, at_once):
            for number, result in enumerate(way(turn)):
                np.testing.assert_array_equal(
                    result, alone[number], f"{way.__name__} {turn}: {lengths[number]} elements"
                )


@pytest.mark.ranks(2, 3)
def test_the_engine_has_a_floating_point_mode_of_its_own(world: World) -> None:
    """Denormals are summed whichever thread drives, also where the script has them flushed to zero."""
    bits = 71_362
    expected = torch.full((4,), bits * world.size, dtype=torch.int32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        for turn in range(4):
            x = torch.full((4,), bits, dtype=torch.int32).view(torch.float32)
            handle = collective.allreduce_async(x, Sum, name=f"denormal.{turn}")
            if (world.rank + turn) % 2:  # then the engine's thread does it, else this one
                time.sleep(0.02)
            assert torch.equal(handle.wait().view(torch.int32), expected)
        p = torch.nn.Parameter(torch.zeros(4))
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([p], lr=1.0), compression=hvd.Compression.bf16, gradient_as_bucket_view=False
        )
        p.grad = torch.full((4,), 3 << 16, dtype=torch.int32).view(torch.float32)  # is one in bfloat16, too
        optimizer.synchronize()
        assert p.grad.view(torch.int32).tolist() == [3 << 16] * 4
    finally:
        torch.set_flush_denormal(False)


def test_minimum_and_maximum_propagate_nan(world: World) -> None:
    for dtype in FLOATS:
        for length in (40, 20_000):
            x = np.full(length, float(world.rank))
            x[world.rank] = np.nan
            for op in (Min, Max):
                for kind in kinds(dtype):
                    result = collective.allreduce(make(x, dtype, kind), op)
                    told = np.isnan(result) if kind == "numpy" else torch.isnan(result).numpy()
                    np.testing.assert_array_equal(np.flatnonzero(told), np.arange(world.size))


def _layouts(op: Op, rank: int) -> dict[str, Any]:
    """Arrays that do not lie in memory in C order."""
    x = values(op, (6, 4), "float32", rank).astype("float32")
    t = torch.from_numpy(x.copy())
    z = torch.from_numpy(values(op, (6, 4), "complex64", rank).astype("complex64"))
    return {
        "numpy transposed": x.T,
        "numpy every second": x[::2, 1::2],
        "numpy backwards": x[::-1],
        "numpy broadcast": np.broadcast_to(x[0], (3, 4)),
        "numpy Fortran": np.asfortranarray(x),
        "numpy read-only": np.frombuffer(x.tobytes(), "float32"),
        "torch transposed": t.t(),
        "torch every second": t[::2, 1::2],
        "torch expanded": t[0].expand(3, 4),
        "torch channels last": t.reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "torch that needs a gradient": t.clone().requires_grad_(),
        "torch conjugate": z.conj(),
        "torch imaginary": z.conj().imag,
    }


def test_arrays_of_any_layout(world: World) -> None:
    every = [_layouts(Sum, rank) for rank in range(world.size)]
    for what, mine in every[world.rank].items():
        arrays = [layouts[what] for layouts in every]
        plain = [a.detach().resolve_conj().resolve_neg().numpy() if isinstance(a, torch.Tensor) else a for a in arrays]
        result = collective.allreduce(mine, Sum)
        assert type(result) is type(mine), what
        check(result, np.sum(plain, 0).astype("complex128" if "conj" in what else "float64"), 0, what)
        if isinstance(result, torch.Tensor):
            assert result.is_contiguous() and not result.requires_grad, what  # noqa: PT018


def test_numbers(world: World) -> None:
    total = world.size * (world.size + 1) / 2
    for number in (world.rank + 1, float(world.rank + 1), np.float32(world.rank + 1)):
        result = collective.allreduce(number, Sum)
        assert np.shape(result) == ()
        assert result == total, type(number)
    assert bool(collective.allreduce(world.rank == 0, Max))
    assert collective.allreduce(1, 1) == world.size  # operators are Horovod's numbers, too


@pytest.mark.ranks(2)
def test_arrays_that_come_by_dlpack(world: World) -> None:
    class Foreign:
        def __init__(self, x: np.ndarray) -> None:
            self.__dlpack__, self.__dlpack_device__ = x.__dlpack__, x.__dlpack_device__

    x = fill(500, "float32", world.rank)
    total = np.sum([fill(500, "float32", rank) for rank in range(world.size)], axis=0)
    np.testing.assert_array_equal(collective.allreduce(Foreign(x), collective.Sum), total)
