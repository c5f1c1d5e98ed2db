"""init and shutdown in all their forms; the processes beside the ranks. See also test_job_end.py."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import collective
from collective import Sum
from mpi_plugin import World
from mpirun import run_ranks

CALLS: dict[str, Callable[[], Any]] = {
    **{name: getattr(collective, name) for name in ("rank", "size", "local_rank", "local_size", "barrier")},
    **{name: getattr(collective, name) for name in ("cross_rank", "cross_size", "is_homogeneous")},
    **{
        name: lambda name=name: getattr(collective, name)(np.ones(3))
        for name in ("allreduce", "allreduce_", "allreduce_async", "broadcast", "broadcast_async_", "allgather")
    },
}


def works(size: int) -> None:
    total = collective.allreduce(np.full(5, collective.rank() + 1), Sum)
    np.testing.assert_array_equal(total, np.full(5, size * (size + 1) // 2))


# ---- init and shutdown ----


@pytest.mark.ranks(1, 2, 3)
def test_again_and_again(world: World) -> None:
    collective.init()  # changes nothing
    works(world.size)
    for _ in range(10):
        collective.shutdown()
        collective.shutdown()
        assert not collective.is_initialized()
        collective.init()
        assert collective.is_initialized()
        works(world.size)


@pytest.mark.ranks(1, 3)
def test_after_shutdown(world: World) -> None:
    collective.shutdown()
    for name, call in CALLS.items():
        with pytest.raises(collective.NotInitializedError, match=r"init\(\)"):
            call()
        assert not collective.is_initialized(), name
    collective.init()
    works(world.size)


@pytest.mark.ranks(1, 2)
def test_results_outlive_the_runtime(world: World) -> None:
    """So do handles that are finished, and errors that they hold."""
    handle = collective.allgather_async(np.full(2, collective.rank()))
    while not handle.poll():
        time.sleep(0.001)
    unfinished = collective.allreduce_async(np.ones(3), name="only here") if collective.rank() == 0 else None
    collective.shutdown()
    size = world.comm.size
    np.testing.assert_array_equal(handle.wait(), np.repeat(np.arange(size), 2))
    if unfinished is not None and size > 1:
        with pytest.raises(collective.ShutdownError, match=r"allreduce 'only here'.*rank \d"):
            unfinished.wait()


@pytest.mark.ranks(2, 3)
def test_an_interrupted_wait_can_be_resumed(world: World) -> None:
    """Ctrl-C is heard within a moment, and where it is caught, nothing is lost."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        if world.rank == 0:
            handle = collective.allreduce_async(np.full(4, 1), Sum, name="interrupted")
            for _ in range(2):
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                with pytest.raises(KeyboardInterrupt):
                    handle.wait()
        world.comm.Barrier()
        if world.rank > 0:
            handle = collective.allreduce_async(np.full(4, 1), Sum, name="interrupted")
        np.testing.assert_array_equal(handle.wait(), np.full(4, world.size))
    finally:
        signal.signal(signal.SIGALRM, previous)
    works(world.size)


@pytest.mark.ranks(3, 4)
def test_a_list_of_ranks(world: World) -> None:
    me, size = world.rank, world.size
    collective.shutdown()
    for members in ([size - 1, 0], [1], list(range(size))[::-1], (0, 1, 2)):
        if me in members:
            collective.init(members)
            assert collective.size() == len(members)
            assert collective.rank() == list(members).index(me)
            np.testing.assert_array_equal(collective.allgather(me), members)
            works(len(members))
            collective.shutdown()
        else:
            with pytest.raises(collective.InvalidArgumentError, match=rf"rank {me} of {size}"):
                collective.init(members)
        world.comm.Barrier()
    for wrong in ([], [0, 0, *range(1, size)], [*range(size), size], [-1, *range(size)]):
        with pytest.raises(collective.InvalidArgumentError, match=re.escape(str(wrong))):
            collective.init(wrong)
    assert not collective.is_initialized()


@pytest.mark.ranks(2, 3, 4)
def test_communicators(world: World) -> None:
    """Halves work apart; messages that the user sends over the same communicator are not ours."""
    from mpi4py import MPI

    me, size = world.rank, world.size
    collective.shutdown()
    half = world.comm.Split(me % 2, -me)
    collective.init(half)
    assert (collective.rank(), collective.size()) == (half.rank, half.size)
    for turn in range(20):
        request = half.isend(("user's", turn), (half.rank + 1) % half.size, tag=turn % 5)
        handle = collective.allreduce_async(np.full(20_000, float(me)), Sum, name="half")
        assert half.recv(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG) == ("user's", turn)
        assert handle.wait()[-1] == sum(rank for rank in range(size) if rank % 2 == me % 2)
        request.wait()
    collective.shutdown()
    half.Free()


@pytest.mark.ranks(2)
def test_no_communicator(world: World) -> None:
    """What Split() gives to a rank that is to stay out, and what is no communicator at all."""
    from mpi4py import MPI

    collective.shutdown()
    for wrong in (MPI.COMM_NULL, 5, "01", [0.5, 1], MPI.INT):
        with pytest.raises((collective.InvalidArgumentError, TypeError)):
            collective.init(wrong)
        assert not collective.is_initialized()


# ---- processes beside the ranks ----


@pytest.mark.ranks(2)
def test_forked_child(world: World) -> None:
    """Every call is refused there, nothing hangs at its end, and the parent goes on meanwhile."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        try:
            said.append(f"is_initialized: {collective.is_initialized()}")
            for name, call in {**CALLS, "init": collective.init}.items():
                try:
                    call()
                    said.append(f"{name}: no error")
                except collective.ForkError as error:
                    if f"rank {world.comm.rank}" not in str(error):
                        said.append(f"{name}: {error}")
            collective.shutdown()
        except BaseException as error:
            said.append(repr(error))
        os.write(writer, "\n".join(said).encode())
        os._exit(0)
    for _ in range(50):
        works(world.size)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == "is_initialized: False"
    assert os.waitpid(child, 0) == (child, 0)
    works(world.size)


def test_forked_child_that_ends_by_itself() -> None:
    """With a status of its own, and without a word to MPI, while an operation is in flight in the parent."""
    done = run_ranks(
        2,
        [
            "-c",
            """
import os, sys
import numpy as np
import collective
collective.init()
handle = collective.allreduce_async(np.ones(1_000_000), collective.Sum, name="in flight")
child = os.fork()
if child == 0:
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert handle.wait()[-1] == 2
assert collective.allreduce(1, collective.Sum) == 2
print("well", collective.rank())
""",
        ],
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["0", "1", "well", "well"]


def test_worker_processes(tmp_path: Path) -> None:
    """Forked and spawned workers of a rank, a DataLoader's say: free of MPI, and init() is refused there."""
    script = tmp_path / "workers.py"
    script.write_text(
        """
import multiprocessing, sys
import numpy as np
import collective

def work(number):
    refused = 0
    for call in (collective.init, collective.rank, lambda: collective.allreduce(np.ones(2))):
        try:
            call()
        except collective.ForkError:
            refused += 1
    # What the import in a spawned worker has brought; a forked one has all that its parent has.
    return number, refused, "mpi4py.MPI" in sys.modules

if __name__ == "__main__":
    collective.init()
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            result = pool.map(work, range(2))
        assert result == [(0, 3, method == "fork"), (1, 3, method == "fork")], (method, result)
        collective.barrier()
    print("well", collective.rank())
"""
    )
    done = run_ranks(2, script, 60)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["0", "1", "well", "well"]
