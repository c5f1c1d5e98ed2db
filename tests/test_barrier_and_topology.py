"""barrier, and where a rank stands."""

import threading
import time

import pytest

import collective
from harness.plugin import World

pytestmark = pytest.mark.ranks(1, 2, 3, 4, 7)


def test_nobody_leaves_a_barrier_before_the_last_has_come(world: World) -> None:
    for turn in range(5):
        late = turn % world.size
        world.comm.Barrier()
        if world.rank == late:
            time.sleep(0.05)
        came = time.monotonic()  # one clock for all processes of a machine
        collective.barrier(name="meet" if turn % 2 else None)
        left = time.monotonic()
        moments = world.comm.allgather((came, left))
        assert max(c for c, _ in moments) <= min(end for _, end in moments), f"turn {turn}: {moments}"


def test_barriers_of_two_threads(world: World) -> None:
    """Each thread has its own names and meets its like on the other ranks."""

    def meet(name: str) -> None:
        for turn in range(20):
            collective.barrier(name=f"{name}.{turn}")

    threads = [threading.Thread(target=meet, args=(name,)) for name in ("a", "b")]
    for thread in threads if world.rank % 2 else reversed(threads):
        thread.start()
    for thread in threads:
        thread.join()


def test_topology(world: World) -> None:
    mine = (
        collective.rank(),
        collective.local_rank(),
        collective.local_size(),
        collective.cross_rank(),
        collective.cross_size(),
    )
    everyone = world.comm.allgather(mine)
    size = collective.size()
    assert size == world.comm.size
    # The tests run on one node, whose ranks all have a local rank of their own.
    assert [rank for rank, *_ in everyone] == list(range(size))
    assert [local_rank for _, local_rank, *_ in everyone] == list(range(size))
    assert all(rest == [size, 0, 1] for _, _, *rest in everyone)
    assert collective.is_homogeneous()
    assert collective.is_initialized()
