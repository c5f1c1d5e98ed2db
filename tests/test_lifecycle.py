"""init and shutdown in all their forms; the processes beside the ranks. See also test_job_end.py."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import collective
import collective.torch as hvd
from collective import Sum, runtime
from harness.mpirun import environment, mpirun_command, run_ranks
from harness.plugin import World

PLACE = ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size", "is_homogeneous")
CALLS: dict[str, Callable[[], Any]] = {
    **{name: getattr(collective, name) for name in (*PLACE, "barrier")},
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
        with pytest.raises(collective.NotInitializedError, match=r"has not been initialized: call init\(\)"):
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


@pytest.mark.ranks(2)
def test_a_failed_init_leaves_nothing_behind(world: World) -> None:
    """Neither a runtime nor sets: the same objects may be given to the next one."""
    collective.shutdown()
    first, second = collective.ProcessSet([0]), collective.ProcessSet([1])
    for wrong, error in (
        ([first, collective.ProcessSet([0])], collective.InvalidArgumentError),
        ([first, [0.5]], collective.InvalidArgumentError),
        ([second, [world.comm.rank]], collective.MismatchError),
        ([first, [7]], collective.InvalidArgumentError),
        ("static", collective.InvalidArgumentError),
        (first, collective.InvalidArgumentError),
    ):
        with pytest.raises(error):
            collective.init(process_sets=wrong)
        assert not collective.is_initialized()
        assert (first.process_set_id, first.mpi_comm) == (second.process_set_id, second.mpi_comm) == (None, None)
    for _ in range(2):
        collective.init(process_sets=(s for s in (first, second)))
        assert (first.process_set_id, second.process_set_id) == (1, 2)
        works(2)
        mine = first if first.included() else second
        np.testing.assert_array_equal(collective.allreduce(np.ones(2), Sum, process_set=mine), np.ones(2))
        collective.shutdown()


@pytest.mark.ranks(3)
def test_numbers_start_again_with_each_init(world: World) -> None:
    """Names of optimizers as well: ranks that were in a smaller job before count like the others."""

    def train() -> None:
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD([weight], 1.0))
        (weight * (collective.rank() + 1)).sum().backward()
        optimizer.step()
        assert weight[0].item() == -(collective.size() + 1) / 2

    collective.shutdown()
    if world.comm.rank < 2:
        collective.init([0, 1])
        train()
        train()
        collective.shutdown()
    collective.init()
    assert [runtime.current().next_number("thing", s) for s in (0, 0, 1)] == [0, 1, 0]
    train()


# ---- MPI's own start and end ----


def ends_well(ranks: int, code: str, **env: str) -> str:
    done = run_ranks(ranks, ["-c", code], 40, env=env)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_mpi_that_mpi4py_does_not_initialise() -> None:
    """Then init() does, and ends it; MPI's errors are exceptions as ever."""
    said = ends_well(
        2,
        """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
import collective
collective.init()
assert MPI.Query_thread() == MPI.THREAD_MULTIPLE
try:
    MPI.COMM_WORLD.Send(bytearray(1), 5)
except MPI.Exception:
    print(collective.allreduce(1, collective.Sum), flush=True)
""",
    )
    assert said.split() == ["2", "2"]


def test_a_script_that_finalises_mpi() -> None:
    """The runtime ends in time, in order, with all ranks; what comes after says so."""
    said = ends_well(
        2,
        """
import numpy as np
from mpi4py import MPI
import collective
collective.init()
some = collective.add_process_set([1])
handle = collective.allreduce_async(np.ones(3), name="never anywhere else") if collective.rank() else None
collective.barrier()
MPI.Finalize()
for call in (collective.rank, handle.wait if handle else collective.size, collective.init):
    try:
        call()
    except collective.CollectiveError as error:
        print(type(error).__name__, flush=True)
""",
    )
    names = ["InvalidArgumentError", "NotInitializedError"]
    assert sorted(said.split()) == sorted([*names, *names, "NotInitializedError", "ShutdownError"])


# ---- processes beside the ranks ----


@pytest.mark.ranks(2)
def test_forked_child(world: World) -> None:
    """Every call is refused there but those for its parent's place; nothing hangs, and the parent goes on meanwhile."""
    place = [CALLS[name]() for name in PLACE]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        try:
            said.append(f"is_initialized: {collective.is_initialized()}")
            if [CALLS[name]() for name in PLACE] != place:
                said.append("the place differs")
            for name, call in {**CALLS, "init": collective.init}.items():
                if name in PLACE:
                    continue
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
import multiprocessing, os, sys
import numpy as np
import collective

def work(number):
    forked = "mpi4py.MPI" in sys.modules  # and has all that its parent has; a spawned one has imported no MPI
    refused = 0
    for call in (collective.init, collective.rank, lambda: collective.allreduce(np.ones(2))):
        try:
            call()
        except collective.ForkError as error:
            refused += f"rank {os.environ['RANK_OF_PARENT']}" in str(error)
    if forked:
        assert collective.rank() == int(os.environ["RANK_OF_PARENT"])
    return number, refused, forked

if __name__ == "__main__":
    collective.init()
    os.environ["RANK_OF_PARENT"] = str(collective.rank())
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            result = pool.map(work, range(2))
        expected = (2, True) if method == "fork" else (3, False)
        assert result == [(0, *expected), (1, *expected)], (method, result)
        collective.barrier()
    print("well", collective.rank())
"""
    )
    done = run_ranks(2, script, 60)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["0", "1", "well", "well"]


def test_children_that_would_take_their_parents_place(tmp_path: Path) -> None:
    """They have the launcher's variables. Refused are a child's init() and a grandchild's; not a new mpirun's, nor the
    rank's own after exec."""
    script = tmp_path / "children.py"
    script.write_text(
        """
import json, os, subprocess, sys
import collective
from collective.config import environment_outside_the_job

what = sys.argv[1]
if what in ("child", "grandchild"):
    if what == "grandchild":
        sys.exit(subprocess.run([sys.executable, __file__, "child"]).returncode)
    try:
        collective.init()
    except collective.ForkError as error:
        sys.exit(17 if f"rank {os.environ['RANK_OF_PARENT']}" in str(error) else str(error))
elif what in ("job", "executed"):
    collective.init()
    assert collective.allreduce(1, collective.Sum) == collective.size() == 2
    print(what, flush=True)
elif what == "parent":
    collective.init()
    os.environ["RANK_OF_PARENT"] = str(collective.rank())
    for child in ("child", "grandchild"):
        assert subprocess.run([sys.executable, __file__, child]).returncode == 17, child
    child = os.fork()
    if child == 0:
        try:
            collective.init()
        except collective.ForkError:
            os._exit(17)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    if collective.rank() == 0:
        mpirun = [*json.loads(os.environ["MPIRUN"]), "-n", "2", sys.executable, __file__, "job"]
        subprocess.run(mpirun, env=environment_outside_the_job(), check=True)
    print("parent", collective.allreduce(1, collective.Sum), flush=True)
"""
    )
    done = run_ranks(2, [script, "parent"], 60, env={"MPIRUN": json.dumps(mpirun_command())})
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "job", "job", "parent 2", "parent 2"]
    # Before MPI is initialised, a rank may become another program.
    code = "import os, sys; from collective import config; config.mark_rank(os.getpid(), 0); os.execv(sys.executable, "
    done = run_ranks(2, ["-c", code + f"[sys.executable, {str(script)!r}, 'executed'])"], 60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["executed"] * 2


def test_a_child_of_a_single_process_is_another_single_process() -> None:
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import collective, os, subprocess, sys; collective.init(); print(collective.size(), flush=True); "
            "len(sys.argv) > 1 or subprocess.run([sys.executable, *sys.orig_argv[1:], 'child'], check=True)",
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert said.stdout == "1\n1\n"
