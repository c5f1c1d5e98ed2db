"""Python objects between ranks."""

import dataclasses
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

import collective
import collective.torch as hvd
from harness.mpirun import run_ranks
from harness.plugin import World
from training import settings


@dataclasses.dataclass
class Checkpoint:
    epoch: int
    history: list[float]


def objects(rank: int) -> list[Any]:
    """Of every kind, size and rank another."""
    return [
        None,
        rank,
        "r" * rank,
        b"\0" * (100_000 * rank + 1),
        {"rank": rank, "nested": [(rank,), {rank}]},
        OrderedDict(z=rank, a=-rank),
        Checkpoint(rank, [0.5] * rank),
        3.0 + rank * 1j,
        ValueError(f"rank {rank}"),
    ]


@pytest.mark.ranks(1, 2, 3, 4)
def test_broadcast_object(world: World) -> None:
    for root in range(world.size):
        for mine, expected in zip(objects(world.rank), objects(root), strict=True):
            result = hvd.broadcast_object(mine, root)
            assert repr(result) == repr(expected)
            assert (result is mine) or world.rank != root
    assert hvd.broadcast_object("x" if world.rank == 0 else None) == "x"
    for epoch in range(3):  # one name, again and again, with contents of another size
        assert hvd.broadcast_object([world.rank] * epoch, world.size - 1, name="epoch") == [world.size - 1] * epoch


@pytest.mark.ranks(1, 2, 3, 4)
def test_allgather_object(world: World) -> None:
    for number, mine in enumerate(objects(world.rank)):
        result = hvd.allgather_object(mine, name=f"object {number}" if number % 2 else None)
        assert repr(result) == repr([objects(rank)[number] for rank in range(world.size)])
    for epoch in range(3):
        expected = ["x" * rank * epoch for rank in range(world.size)]
        assert hvd.allgather_object("x" * world.rank * epoch, name="epoch") == expected
    mutable = [world.rank]
    assert hvd.allgather_object(mutable)[world.rank] is not mutable


@pytest.mark.ranks(2)
def test_arrays_tensors_and_code(world: World) -> None:
    rank = world.rank

    class Local:  # defined nowhere else, so it travels with its code
        def value(self) -> int:
            return 7 * rank

    function = hvd.broadcast_object((lambda x: x + rank) if rank == 0 else None)
    assert function(1) == 1
    assert [one.value() for one in hvd.allgather_object(Local())] == [0, 7]
    array = hvd.broadcast_object(np.arange(rank, rank + 3), 1)
    assert array.tolist() == [1, 2, 3]
    array[0] = 9  # what arrives is the receiver's own
    tensor = hvd.broadcast_object(torch.full((2, 2), float(rank)), 1)
    assert torch.equal(tensor.add_(1), torch.full((2, 2), 2.0))
    modules = hvd.allgather_object(torch.nn.Linear(rank + 1, 2))
    assert [module.in_features for module in modules] == [1, 2]


@pytest.mark.ranks(2, 3)
def test_wrong_roots(world: World) -> None:
    for root in (-1, world.size, 0.5, None):
        with pytest.raises(collective.InvalidArgumentError, match=f"root_rank {root!r} "):
            hvd.broadcast_object("x", root)  # type: ignore[arg-type]
    with pytest.raises(collective.MismatchError, match="root"):
        hvd.broadcast_object("x", 1 if world.rank == 1 else 0)
    assert hvd.broadcast_object(world.rank, 1) == 1


@pytest.mark.ranks(2, 3)
@pytest.mark.limit(30)
def test_object_that_cannot_be_pickled(world: World) -> None:
    """The other ranks learn of it, rather than wait for what never comes, and the job goes on."""
    with settings(timeout=10):
        for call, culprit in ((hvd.broadcast_object, 0), (hvd.allgather_object, 1)):
            mine: Any = (one for one in "generator") if world.rank == culprit else "fine"
            here = world.rank == culprit
            with pytest.raises(TypeError if here else collective.CollectiveError, match="pickle"):
                call(mine)
            assert hvd.broadcast_object(world.rank, 1) == 1
            assert hvd.allgather_object(world.rank) == list(range(world.size))


def test_objects_of_the_scripts_own_classes() -> None:
    """A class of `__main__` is the same class on every rank, what has no name travels all the same."""
    script = """
import dataclasses, enum, collective
collective.init()
class Colour(enum.Enum):
    RED = 1
@dataclasses.dataclass
class Point:
    x: int
assert collective.broadcast_object(Colour.RED) is Colour.RED
assert collective.broadcast_object(Point(1)) == Point(1)
assert collective.allgather_object(Point(collective.rank())) == [Point(0), Point(1)]
assert collective.broadcast_object(lambda: 3)() == 3
print("same")
"""
    done = run_ranks(2, ["-c", script], 60)
    assert done.stdout.count("same") == 2, done.stdout + done.stderr
