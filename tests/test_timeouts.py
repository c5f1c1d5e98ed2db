"""A rank that is late: the warning that names it, the error on every rank, and the job that goes on.

The warnings are those of an engine that cannot ask beside MPI; test_hangs.py is about the others.
"""

import inspect
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import collective
import collective.torch as hvd
from collective import Sum
from harness.mpirun import run_ranks
from harness.plugin import World


@contextmanager
def settings(world: World, **seconds: float) -> Iterator[None]:
    """The runtime with these settings, COLLECTIVE_* in small letters; the next test gets one with the defaults."""
    collective.shutdown()
    variables = {f"COLLECTIVE_{name.upper()}": str(value) for name, value in seconds.items()}
    variables["COLLECTIVE_OUT_OF_BAND"] = "0"
    os.environ.update(variables)
    try:
        collective.init()
    finally:
        for name in variables:
            del os.environ[name]
    world.comm.Barrier()
    yield
    collective.shutdown()


def named(ranks: list[int]) -> str:
    """As the messages name a few ranks."""
    parts = [str(ranks[0])] if len(ranks) == 1 else [f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 2 else "0, 1"]
    return ("rank " if len(ranks) == 1 else "ranks ") + parts[0]


@pytest.mark.ranks(2, 4)
def test_a_warning_names_the_tensor_and_the_missing_ranks(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    late = world.size - 1
    with settings(world, stall_warning=0.3, timeout=100):
        if world.rank == late:
            time.sleep(1.5)
        handles = [collective.allreduce_async(np.ones(n), Sum, name=f"layer{n}.weight") for n in range(8)]
        for n, handle in enumerate(handles):
            np.testing.assert_array_equal(handle.wait(), np.full(n, world.size))
        said = capfd.readouterr().err
        if world.rank == 0:  # which coordinates; the others are silent
            here = named(list(range(late)))
            first = rf"allreduce 'layer0.weight': submitted by {here}, waits for rank {late} since 0\.[3-9] s"
            assert re.search(first, said), said
            assert "and 2 more" in said  # a warning stays readable
            assert 1 <= said.count("stalled") <= 3  # after 0.3, 0.9, 2.1 s
        else:
            assert said == ""


def somewhere_else(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("late", [0, -1], ids=["first", "last"])
def test_a_warning_tells_where_the_script_of_the_missing_rank_is(
    world: World, capfd: pytest.CaptureFixture[str], late: int
) -> None:
    late %= world.size
    with settings(world, stall_warning=1, timeout=100):
        if world.rank == late:
            somewhere_else(2)
        collective.allreduce(np.ones(3), Sum, name="x")
        said = capfd.readouterr().err
        if world.rank == 0:
            line = inspect.getsourcelines(somewhere_else)[1] + 1
            place = rf"rank {late}: its script is at test_timeouts\.py:{line} in somewhere_else, called from test_timeo"
            assert re.search(place, said), said


@pytest.mark.ranks(2)
def test_ranks_that_wait_crosswise_are_told_so(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0 in "a", rank 1 in "b": each has what the other waits for."""
    with settings(world, stall_warning=0.6, timeout=2):
        first, second = ("a", "b") if world.rank == 0 else ("b", "a")
        with pytest.raises(collective.CollectiveTimeoutError) as caught:
            collective.allreduce(np.ones(3), Sum, name=first)
        other = 1 - world.rank
        assert f"rank {other}: waits itself, for allreduce '{second}'" in str(caught.value)
        if world.rank == 0:
            said = capfd.readouterr().err
            assert "rank 0: waits itself, for allreduce 'a'" in said
            assert "rank 1: waits itself, for allreduce 'b'" in said


@pytest.mark.ranks(2, 3)
def test_the_late_rank_may_be_the_coordinator(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Its engine answers for it while its script does something else."""
    with settings(world, stall_warning=0.3, timeout=100):
        if world.rank == 0:
            time.sleep(1)
        collective.barrier(name="meet")
        assert (world.rank == 0) == ("barrier 'meet'" in capfd.readouterr().err)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("late", [0, -1], ids=["first", "last"])
def test_a_timeout_is_an_error_on_every_rank_and_the_job_goes_on(world: World, late: int) -> None:
    late %= world.size
    x = np.full(3, world.rank + 1.0)
    with settings(world, timeout=2, stall_warning=100):
        if world.rank == late:
            world.comm.Barrier()
        begin = time.monotonic()
        handles = {
            "allreduce": collective.allreduce_async_(x, Sum, name="t1"),
            "broadcast": collective.broadcast_async_(x, name="t2"),
            "allgather": collective.allgather_async(x, name="t3"),
        }
        for number, (operation, handle) in enumerate(handles.items(), 1):
            for _ in range(2):
                with pytest.raises(collective.CollectiveTimeoutError) as caught:
                    handle.wait()
            for part in (f"{operation} 't{number}'", f"rank {late}", "2.0 s"):
                assert part in str(caught.value), f"no {part!r} in: {caught.value}"
        assert (time.monotonic() - begin < 1.5) == (world.rank == late)  # nobody waits for it a second time
        np.testing.assert_array_equal(x, np.full(3, world.rank + 1.0))
        if world.rank != late:
            world.comm.Barrier()
        for name in ("t1", "t2", "another", None):  # under names that failed, too
            for shape in (3, 5):
                total = collective.allreduce(np.full(shape, world.rank + 1), Sum, name=name)
                np.testing.assert_array_equal(total, np.full(shape, world.size * (world.size + 1) // 2))


@pytest.mark.ranks(3)
def test_calls_stay_paired_when_a_rank_is_late_more_than_once(world: World) -> None:
    """Its n-th call meets the n-th of the others, whatever became of those before."""
    late = world.size - 1
    with settings(world, timeout=1, stall_warning=100):
        if world.rank == late:
            world.comm.Barrier()
        for turn in range(3):
            with pytest.raises(collective.CollectiveTimeoutError):
                print(world.rank, turn, collective.allreduce(np.full(2, turn), Sum, name="again"))
        if world.rank != late:
            world.comm.Barrier()
        for turn in range(3):
            result = collective.allreduce(np.full(2, turn), Sum, name="again")
            np.testing.assert_array_equal(result, np.full(2, turn * world.size), f"turn {turn}")


@pytest.mark.ranks(3, 4)
def test_ranks_that_are_late_together_or_one_by_one(world: World) -> None:
    """Rank n comes when n calls have failed: all its calls up to then fail at once, and the rest is in step."""
    with settings(world, timeout=1, stall_warning=100):
        for _ in range(world.rank):
            world.comm.Barrier()
        for call in range(world.size + 2):
            if call < world.size - 1:
                with pytest.raises(collective.CollectiveTimeoutError):
                    print(collective.allreduce(np.full(2, call), Sum, name="one by one"))
                if call >= world.rank:
                    world.comm.Barrier()
            else:
                result = collective.allreduce(np.full(2, call), Sum, name="one by one")
                np.testing.assert_array_equal(result, np.full(2, call * world.size), f"call {call}")


def train(steps: int, ranks: collective.ProcessSet = hvd.global_process_set) -> Iterator[None]:
    """Steps of an optimizer whose gradients all go into one bucket; yields before each."""
    model = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.Linear(30, 2))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(), process_set=ranks
    )
    for _ in range(steps):
        yield
        optimizer.zero_grad()
        model(torch.ones(8, 30)).sum().backward()
        optimizer.step()


@pytest.mark.ranks(3)
def test_a_stalled_bucket_names_who_has_not_started_it(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Buckets run without agreement: every rank that waits asks the others."""
    late = world.size - 1
    with settings(world, stall_warning=0.5, timeout=100):
        for step, _ in enumerate(train(3)):
            world.comm.Barrier()
            if step == 2 and world.rank == late:
                time.sleep(2.5)
        warnings = re.findall(r"stalled: bucket '([^']+)': (.*?);", capfd.readouterr().err)
    told = world.comm.allgather(warnings)
    assert [len(of_rank) for of_rank in told] == [1] * late + [0], told
    where = f"rank {late} did not start run 3: its script is at test_timeouts.py:"
    assert all(what.startswith(where) for of_rank in told for _, what in of_rank), told
    assert len({name for of_rank in told for name, _ in of_rank}) == 1


@pytest.mark.ranks(3)
def test_a_rank_that_waits_itself_is_not_blamed(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 2 is late for what rank 1 waits for, in another set; rank 0 waits for both in a bucket."""
    with settings(world, stall_warning=0.5, timeout=100):
        some = collective.add_process_set([1, 2])
        for step, _ in enumerate(train(3)):
            world.comm.Barrier()
            if step == 2 and world.rank == 2:
                time.sleep(2.5)
            if step == 2 and some.included():
                collective.allreduce(np.ones(2), name="metric", process_set=some)
        said = capfd.readouterr().err
        if world.rank == 0:
            told = (
                r"stalled: bucket '[^']+': rank 2 did not start run 3: its script is at [^;]*; "
                r"rank 1 has not reached run 3: it waits itself, for process set \[1, 2\]: allreduce 'metric'; "
            )
            assert re.search(told, said), said


@pytest.mark.ranks(3)
def test_a_process_set_names_ranks_by_their_numbers_in_the_job(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 2 is late, number 1 of its set, whose coordinator is rank 1."""
    with settings(world, stall_warning=0.3, timeout=2):
        some = collective.add_process_set([1, 2])
        if world.rank == 1:
            with pytest.raises(collective.CollectiveTimeoutError) as caught:
                collective.allreduce(np.ones(3), name="late", process_set=some)
            first, *where = str(caught.value).splitlines()
            assert first == "process set [1, 2]: allreduce 'late': rank 2 did not submit it within 2.0 s"
            assert all(line.startswith("  rank 2: its script is at test_timeouts.py:") for line in where)
            told = r"rank 1: process set \[1, 2\]: stalled: .*\n.*: submitted by rank 1, waits for rank 2 since"
            assert re.search(told, capfd.readouterr().err)
        world.comm.Barrier()
        if world.rank == 2:
            with pytest.raises(collective.CollectiveTimeoutError, match="rank 2 submitted it too late"):
                collective.allreduce(np.ones(3), name="late", process_set=some)
        world.comm.Barrier()
        if some.included():
            for step, _ in enumerate(train(3, some)):
                if step == 2 and world.rank == 2:
                    time.sleep(1.2)
        said = capfd.readouterr().err
        assert ("process set [1, 2]: stalled: bucket " in said) == (world.rank == 1), said
        assert ("rank 2 did not start run 3" in said) == (world.rank == 1), said


def test_a_bucket_that_times_out_ends_the_job() -> None:
    """The time-out counts also when it is shorter than the patience of the warning."""
    script = f"""
import time
from collections.abc import Iterator
import torch
import collective
import collective.torch as hvd
from mpi4py import MPI
{inspect.getsource(train)}
hvd.init()
for step, _ in enumerate(train(3)):
    MPI.COMM_WORLD.Barrier()
    if step == 2 and hvd.rank() == 1:
        time.sleep(100)
"""
    done = run_ranks(2, ["-c", script], 60, env={"COLLECTIVE_TIMEOUT": "2"})
    assert done.returncode != 0
    told = (
        r"CollectiveTimeoutError: bucket '[^']+': rank 1 did not start run 3: its script is at .*; "
        r".* did not finish within .* of 2\.0 s"
    )
    assert re.search(told, done.stderr), done.stderr
    assert "rank 0: uncaught CollectiveTimeoutError" in done.stderr


def test_a_process_set_can_be_removed_when_an_engine_has_stopped() -> None:
    """An error on every rank, those included whose script was elsewhere: the one that has stopped tells all others."""

    script = """
import os, time
import torch
import collective
import collective.torch as hvd
hvd.init()
some = hvd.add_process_set([0, 1])
p = torch.nn.Parameter(torch.zeros(3))
optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=0.1), [("p", p)])
p.sum().backward()
optimizer.step()
if hvd.rank() > 0:
    time.sleep(4)
else:
    try:
        p.sum().backward()
        optimizer.step()
    except collective.CollectiveTimeoutError:
        pass
try:
    if hvd.rank() < 2:
        hvd.remove_process_set(some)
except collective.CollectiveTimeoutError as error:
    print(f"rank {hvd.rank()}: {error}", flush=True)
time.sleep((10, 1, 10)[hvd.rank()])  # mpirun ends the job with the first of them
os._exit(0)
"""
    done = run_ranks(3, ["-c", script], 60, env={"COLLECTIVE_TIMEOUT": "2"})
    assert "rank 0: the engine has stopped" in done.stdout, done.stdout + done.stderr
    told = "rank 1: the engine has stopped: the engine of rank 0 has stopped: bucket "
    assert told in done.stdout, done.stdout + done.stderr


def test_a_coordinator_that_is_stopped_is_noticed() -> None:
    """A process that stands still, engine and all, as one does whose machine has gone."""
    done = run_ranks(
        2,
        [
            "-c",
            """
import os, signal
import numpy as np
import collective
collective.init()
collective.barrier()
if collective.rank() == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
collective.allreduce(np.ones(3), name="t")
""",
        ],
        60,
        env={"COLLECTIVE_TIMEOUT": "3", "COLLECTIVE_STALL_WARNING": "1", "COLLECTIVE_OUT_OF_BAND": "0"},
    )
    assert done.returncode != 0
    assert "rank 1: stalled: allreduce 't': rank 0, which coordinates, does not answer" in done.stderr, done.stderr
    assert re.search("CollectiveTimeoutError: allreduce 't': rank 0.* does not answer", done.stderr), done.stderr


def test_a_rank_that_is_late_for_init_is_named() -> None:
    """What makes the runtime blocks without a word, so ranks meet before."""
    code = """
import os, sys, time
from mpi4py import MPI
import collective
if MPI.COMM_WORLD.rank == 1:
    time.sleep(float(sys.argv[1]))
collective.init([0, 1, 2] if len(sys.argv) > 2 else None)
print(collective.allgather_object(collective.rank()), MPI.COMM_WORLD.iprobe(), flush=True)
"""
    late = run_ranks(3, ["-c", code, "2"], 60, env={"COLLECTIVE_TIMEOUT": "50", "COLLECTIVE_STALL_WARNING": "0.3"})
    assert late.returncode == 0, late.stderr
    assert late.stdout.count("[0, 1, 2] False\n") == 3, late.stdout  # none of our messages is left to the user
    assert "rank 0: stalled: init waits for rank 1 since" in late.stderr, late.stderr
    missing = run_ranks(3, ["-c", code, "100"], 60, env={"COLLECTIVE_TIMEOUT": "1"})
    assert missing.returncode != 0
    assert "CollectiveTimeoutError: init: rank 1 did not call it within 1.0 s" in missing.stderr, missing.stderr
    late = run_ranks(3, ["-c", code, "2", "list"], 60, env={"COLLECTIVE_STALL_WARNING": "0.3"})
    assert late.returncode == 0, late.stderr
    assert late.stdout.count("[0, 1, 2] False\n") == 3, late.stdout
    assert "stalled: init on rank 0 waits for one of the ranks [0, 1, 2] since 0.3 s" in late.stderr, late.stderr
    missing = run_ranks(3, ["-c", code, "100", "list"], 60, env={"COLLECTIVE_TIMEOUT": "1"})
    assert missing.returncode != 0
    assert "init: one of the ranks [0, 1, 2] did not call it within 1.0 s" in missing.stderr, missing.stderr


def test_all_ranks_are_told_of_an_engine_that_has_stopped() -> None:
    """Also those to whom the coordinator had no connection yet: it stops itself, and sends the word before it does."""
    code = """
import sys, time
import numpy as np
import collective
collective.init()
rank = collective.rank()
try:
    if rank == 5:
        collective.recv(np.zeros(3), 4)
    time.sleep(1.5)
    collective.recv(np.zeros(3), (rank + 1) % 5)
except collective.CollectiveError as error:
    print(f"rank {rank}: {error}", flush=True)
time.sleep(1)
"""
    messages = {"COLLECTIVE_SHARED_MEMORY": "0", "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "tcp,self"}
    done = run_ranks(6, ["-c", code], 60, env={"COLLECTIVE_TIMEOUT": "3", **messages})
    for rank in range(5):
        assert f"rank {rank}: the engine of rank 5 has stopped: recv from rank 4" in done.stdout, done.stdout
    assert "rank 5: recv from rank 4, tag 0" in done.stdout, done.stdout


def test_texts_are_cut_between_characters() -> None:
    """What another rank waits for is told in a few bytes; names may be in any script."""
    code = f"""
from collections.abc import Iterator
import numpy as np
import torch
import collective
import collective.torch as hvd
{inspect.getsource(train)}
hvd.init()
for step, _ in enumerate(train(3)):
    if step == 2 and hvd.rank() == 1:
        collective.allreduce(np.ones(2), name="x" + "\u00e9" * 200)
"""
    limits = {"COLLECTIVE_TIMEOUT": "4", "COLLECTIVE_STALL_WARNING": "0.5", "COLLECTIVE_OUT_OF_BAND": "0"}
    done = run_ranks(2, ["-c", code], 60, env=limits)
    assert done.returncode != 0
    told = r"rank 0: stalled: bucket .*: rank 1 has not reached run 3: it waits itself, for allreduce 'xé+; "
    assert re.search(told, done.stderr), done.stderr
