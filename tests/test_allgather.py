"""allgather: every dtype and array kind, first dimensions that differ; see also test_ring.py."""

import numpy as np
import pytest
import torch

import collective
from harness.plugin import World
from matrix import DTYPES, Values, check, kinds, make, same_on_all_ranks, transport, values  # noqa: F401

pytestmark = [pytest.mark.ranks(1, 2, 3, 4, 7), pytest.mark.usefixtures("transport")]

TRAILING: tuple[tuple[int, ...], ...] = ((), (3,), (2, 5), (0,))


def rows_of(size: int) -> dict[str, list[int]]:
    """First dimensions by rank."""
    return {
        "none": [0] * size,
        "one each": [1] * size,
        "equal": [5] * size,
        "rising": list(range(size)),
        "falling": list(range(size, 0, -1)),
        "first only": [4] + [0] * (size - 1),
        "last only": [0] * (size - 1) + [4],
    }


def contribution(rows: int, trailing: tuple[int, ...], dtype: str, rank: int) -> Values:
    return values(None, (rows, *trailing), dtype, rank)


def test_every_dtype_and_kind(world: World) -> None:
    running = []
    for dtype in DTYPES:
        for kind in kinds(dtype):
            for what, rows in rows_of(world.size).items():
                for trailing in TRAILING:
                    x = make(contribution(rows[world.rank], trailing, dtype, world.rank), dtype, kind)
                    case = (dtype, kind, what, trailing)
                    running.append((case, x, collective.allgather_async(x, name=f"allgather.{case}")))
    results = []
    for case, x, handle in running:
        dtype, _, what, trailing = case
        result = handle.wait()
        assert type(result) is type(x)
        assert result.dtype == x.dtype
        each = [contribution(r, trailing, dtype, rank) for rank, r in enumerate(rows_of(world.size)[what])]
        check(result, np.concatenate(each), 0, *case)
        check(x, each[world.rank], 0, "input changed", *case)
        results.append(result)
    same_on_all_ranks(world, results)


def test_result_can_be_changed_and_is_the_callers_own(world: World) -> None:
    for kind in ("numpy", "torch"):
        handle = collective.allgather_async(make(np.full(3, float(world.rank)), "float32", kind))
        result = handle.wait()
        result += 1
        assert handle.wait() is result
        check(result, np.repeat(np.arange(world.size) + 1.0, 3), 0, kind)


def test_a_name_comes_again_with_other_rows(world: World) -> None:
    """Rows are no part of what the ranks agree on once: they travel every time."""
    for turn in range(6):
        rows = [(rank * 3 + turn * 5) % 7 for rank in range(world.size)]
        x = contribution(rows[world.rank], (2,), "int32", world.rank).astype("int32")
        expected = np.concatenate([contribution(r, (2,), "int32", rank) for rank, r in enumerate(rows)])
        check(collective.allgather(x, name="again"), expected, 0, turn)


def test_arrays_of_any_layout_and_numbers(world: World) -> None:
    each = [values(None, (6, 4), "float32", rank) for rank in range(world.size)]
    x = each[world.rank].astype("float32")
    t = torch.from_numpy(x.copy())
    check(collective.allgather(x.T), np.concatenate([e.T for e in each]), 0)
    check(collective.allgather(x[:, ::-2]), np.concatenate([e[:, ::-2] for e in each]), 0)
    check(collective.allgather(t.t()), np.concatenate([e.T for e in each]), 0)
    check(collective.allgather(t[1::2]), np.concatenate([e[1::2] for e in each]), 0)
    check(collective.allgather(world.rank + 0.5), np.arange(world.size) + 0.5, 0)
    check(collective.allgather(torch.tensor(world.rank)), np.arange(world.size), 0)
