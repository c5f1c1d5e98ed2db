"""reducescatter and reduce, and the grouped forms: every dtype, array kind and operator."""

import numpy as np
import pytest
import torch

import collective
import collective.torch as hvd
from collective import Average, Max, Sum
from harness.plugin import World
from matrix import COMPLEX, FLOATS, check, combinations, kinds, lengths, make, reduced, rounding, transport, values  # noqa: F401

pytestmark = [pytest.mark.ranks(1, 2, 3, 4), pytest.mark.usefixtures("transport")]


def part(whole: np.ndarray, world: World) -> np.ndarray:
    return np.array_split(whole, world.size)[world.rank]


def test_every_dtype_kind_and_operator(world: World) -> None:
    running = []
    for dtype, kind, op in combinations():
        for count in lengths(world.size):
            x = make(values(op, (count, 2), dtype, world.rank), dtype, kind)
            case = (dtype, kind, op.name, count)
            name = ".".join(map(str, case))
            scattered = collective.reducescatter_async(x, op, name=f"scatter.{name}")
            root = count % world.size
            running.append((case, op, root, scattered, collective.reduce_async(x, root, op, name=f"reduce.{name}")))
    for case, op, root, scattered, at_root in running:
        dtype, _, _, count = case
        whole = reduced(op, (count, 2), dtype, world.size)
        bound = rounding(op, dtype, world.size)
        check(scattered.wait(), part(whole, world), bound, "reducescatter", *case)
        result = at_root.wait()
        assert (result is None) == (world.rank != root)
        if result is not None:
            check(result, whole, bound, "reduce", *case)


def test_large_ones_in_segments(world: World) -> None:
    rows = 70_001
    whole = sum((np.arange(rows * 3.0) + 5 * rank).reshape(rows, 3) for rank in range(world.size))
    x = (np.arange(rows * 3.0) + 5 * world.rank).reshape(rows, 3)
    check(collective.reducescatter(x, Sum), part(whole, world), 0)
    check(collective.reducescatter(x, Average, prescale_factor=2), part(whole * 2 / world.size, world), 1e-9)
    half = collective.reducescatter((x % 7).astype(np.float32), Max, compression="fp16")
    peak = np.max([(np.arange(rows * 3.0) + 5 * rank).reshape(rows, 3) % 7 for rank in range(world.size)], axis=0)
    check(half, part(peak, world), 0)


def test_grouped_forms(world: World) -> None:
    for kind in ("numpy", "torch"):
        xs = [make(np.full(n, float(world.rank + n)), "float32", kind) for n in (1, 5, 70_000)]
        totals = [sum(rank + n for rank in range(world.size)) for n in (1, 5, 70_000)]
        for result, x, total in zip(collective.grouped_allreduce(xs, Sum, name="g"), xs, totals, strict=True):
            check(result, np.full(len(x), total), 0)
        gathered = collective.grouped_allgather(xs, name="g")
        check(gathered[1], np.repeat(np.arange(world.size) + 5.0, 5), 0)
        rows = collective.grouped_reducescatter(xs, Sum, name="g")
        check(rows[1], part(np.full(5, totals[1]), world), 0)
        collective.grouped_allreduce_(xs, Sum, name="g")
        check(xs[2], np.full(70_000, totals[2]), 0)


@pytest.mark.ranks(3, 7)
def test_equal_values_average_to_themselves(world: World) -> None:
    """To the last bit, by every way: a product with 1/7 makes 3.0000002 of 7 threes."""
    for dtype in (*FLOATS, *COMPLEX):
        for length in (5, 70_001):  # short ones are not cut
            whole = values(None, length, dtype, 0)
            for kind in kinds(dtype):
                case = (dtype, kind, length)
                x = make(whole, dtype, kind)
                for result in (collective.allreduce(x), *collective.grouped_allreduce([x, x[:3]])[:1]):
                    check(result, whole, 0, "allreduce", *case)
                check(collective.reducescatter(x), part(whole, world), 0, "reducescatter", *case)
                if (at_root := collective.reduce(x, root_rank=1)) is not None:
                    check(at_root, whole, 0, "reduce", *case)
                check(collective.allreduce(x, postscale_factor=4.0), whole * 4, 0, "scaled", *case)
                for compression in ("fp16", "bf16") if dtype in ("float32", "float64") else ():
                    check(collective.allreduce(x, compression=compression), whole, 0, compression, *case)


@pytest.mark.ranks(3, 7)
def test_equal_gradients_average_to_themselves(world: World) -> None:
    for compression in (hvd.Compression.none, hvd.Compression.fp16):
        parameters = [
            torch.nn.Parameter(torch.zeros(length, dtype=dtype))
            for length in (3, 70_001)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        ]
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), compression=compression)
        whole = [values(None, len(p), "float32", 0) for p in parameters]
        for p, numbers in zip(parameters, whole, strict=True):
            p.grad = make(numbers, str(p.dtype).removeprefix("torch."), "torch")
        optimizer.step()
        for p, numbers in zip(parameters, whole, strict=True):
            check(p.detach(), -numbers, 0, p.dtype, len(p), compression)


def test_integer_averages_wrap_and_truncate(world: World) -> None:
    x = np.array([200, 3, 5], np.uint8)
    wrapped = [200 * world.size % 256 // world.size, 3, 5]
    check(collective.allreduce(x), np.array(wrapped), 0)
    y = np.array([-7, 7], np.int32) * (world.rank + 1)
    total = 7 * world.size * (world.size + 1) // 2
    check(collective.allreduce(y), np.array([-(total // world.size), total // world.size]), 0)


@pytest.mark.ranks(2, 3, 4)
def test_a_group_with_a_mismatch_fails_as_a_whole_and_leaves_nothing_behind(world: World) -> None:
    xs = [np.ones(2), np.ones(2 + world.rank), np.ones(3)]
    with pytest.raises(collective.MismatchError, match="shape differs"):
        collective.grouped_allreduce(xs, name="bad")
    check(collective.grouped_allreduce([np.ones(2)], Sum, name="bad")[0], np.full(2, world.size), 0)


def test_a_factor_in_an_array_is_read_at_each_call(world: World) -> None:
    """As a loss scale, which changes in place."""
    factor = torch.tensor(2.0)
    for expected in (2.0, 1.0, 0.5):
        result = collective.allreduce(torch.ones(4), Sum, prescale_factor=factor)
        assert result.tolist() == [expected * world.size] * 4
        factor.mul_(0.5)


def test_bad_arguments(world: World) -> None:
    with pytest.raises(collective.InvalidArgumentError, match="scalar"):
        collective.reducescatter(1.0)
    with pytest.raises(collective.InvalidArgumentError, match="Adasum"):
        collective.reducescatter(np.ones(3), collective.Adasum)
    with pytest.raises(collective.UnsupportedTypeError, match="Adasum is not defined for int32"):
        collective.allreduce(np.ones(3, np.int32), collective.Adasum)
