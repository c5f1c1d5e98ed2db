"""broadcast: every dtype and array kind from every root; see also test_ring.py."""

import numpy as np
import pytest
import torch

import collective
from harness.plugin import World
from matrix import DTYPES, check, kinds, lengths, make, same_on_all_ranks, transport, values  # noqa: F401

pytestmark = [pytest.mark.ranks(1, 2, 3, 4, 7), pytest.mark.usefixtures("transport")]


def test_every_dtype_and_kind_from_every_root(world: World) -> None:
    shapes = [*lengths(world.size), (), (2, 3, 5), (4, 0, 2)]
    running = []
    for root in range(world.size):
        for dtype in DTYPES:
            for kind in kinds(dtype):
                for salt, shape in enumerate(shapes):
                    x = make(values(None, shape, dtype, world.rank, salt), dtype, kind)
                    in_place = (salt + root) % 2 == 0
                    submit = collective.broadcast_async_ if in_place else collective.broadcast_async
                    handle = submit(x, root, name=f"broadcast.{root}.{dtype}.{kind}.{salt}")
                    running.append((root, dtype, shape, salt, in_place, x, handle))
    results = []
    for root, dtype, shape, salt, in_place, x, handle in running:
        result = handle.wait()
        assert type(result) is type(x)
        assert result.dtype == x.dtype
        assert (result is x) == in_place
        check(result, values(None, shape, dtype, root, salt), 0, root, dtype, shape, in_place)
        if not in_place:
            mine = values(None, shape, dtype, world.rank, salt)
            check(x, mine, 0, "input changed", root, dtype, shape)
        results.append(result)
    same_on_all_ranks(world, results)


def test_bits_arrive_unchanged(world: World) -> None:
    """NaNs with a payload, signed zeros, subnormals, and bools that are not 0 or 1."""
    patterns = np.random.default_rng(0).integers(0, 2**16, 4096, dtype=np.uint16)
    x = patterns if world.rank == 0 else np.zeros_like(patterns)
    result = collective.broadcast(x.view(np.float16))
    np.testing.assert_array_equal(result.view(np.uint16), patterns)
    result = collective.broadcast(torch.from_numpy(x.view(np.int16)).view(torch.bfloat16))
    np.testing.assert_array_equal(result.view(torch.int16).numpy(), patterns.view(np.int16))


def test_arrays_of_any_layout(world: World) -> None:
    root = world.size - 1
    x = values(None, (6, 4), "float32", world.rank).astype("float32")
    sent = values(None, (6, 4), "float32", root)
    t = torch.from_numpy(x.copy())
    check(collective.broadcast(x.T, root), sent.T, 0)
    check(collective.broadcast(x[::-2], root), sent[::-2], 0)
    check(collective.broadcast(t.t(), root), sent.T, 0)
    check(collective.broadcast(t[:, ::2], root), sent[:, ::2], 0)
    # What is laid out otherwise on one rank than on another is one array all the same.
    mixed = np.asfortranarray(x) if world.rank % 2 else x
    check(collective.broadcast(mixed, root), sent, 0)
    either = x if world.rank % 2 else t
    check(collective.broadcast(either, root), sent, 0)


def test_numbers(world: World) -> None:
    for root in range(world.size):
        assert collective.broadcast(world.rank + 0.5, root) == root + 0.5
        assert collective.broadcast(np.int32(world.rank), np.int64(root)) == root
