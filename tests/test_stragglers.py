"""Who holds up the others: found on all ranks, for buckets, names and torch's groups, and told at the end.

The late rank sleeps for 30 ms, which no other delay of a busy machine makes up for in the mean.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import collective
import collective.torch as hvd
from cluster import Cluster, why_not
from collective import ledger
from harness.mpirun import run_ranks
from harness.plugin import World
from training import EACH_ITS_OWN, settings

LATE_S = 0.03
STEPS = 20
WHY_NOT = why_not()


def report(count: int, what: str) -> collective.Stragglers:
    """What is known once the words about so many steps or operations are in; this test ends in a hang otherwise."""
    while True:
        found = collective.stragglers()
        if any(entry.count >= count and entry.what == what for entry in found):
            return collective.Stragglers(entry for entry in found if entry.what == what)
        time.sleep(0.05)


class Slow(torch.autograd.Function):
    """Nothing, which takes its time in backward."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)  # type: ignore[attr-defined]
        return grad, None


def train(steps: int, before: Callable[[], None], within_s: float) -> None:
    """Four layers, each of which has a bucket; within_s: between those of `third` and `second` in backward."""
    torch.manual_seed(0)
    names = ["first", "second", "third", "fourth"]
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8, bias=False) for name in names})
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(layers.parameters(), lr=0.01), named_parameters=layers.named_parameters()
    )
    for _ in range(steps):
        before()
        optimizer.zero_grad()
        x = layers["second"](layers["first"](torch.ones(4, 8) * (1 + hvd.rank())))
        layers["fourth"](layers["third"](Slow.apply(x, within_s))).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@pytest.mark.ranks(2, 3, 4)
def test_operations_by_name(world: World) -> None:
    late = world.size - 1
    with settings():
        for step in range(STEPS):
            if world.rank == late:
                time.sleep(LATE_S)
            collective.allreduce(np.arange(5.0) + world.rank + step, name="the name")
        found = report(STEPS, "operations")
        waited = world.comm.allgather(ledger.local())
    assert found[0].rank == late
    assert found[0].share > 0.5
    assert found[0].lateness_ms > 10
    assert found[0].where == "longest at the name"
    assert found[0].cost_s == pytest.approx(found[0].lateness_ms * 1e-3 * found[0].share * found[0].count)
    assert found[0].cost_s < found[0].elapsed_s
    assert [entry.cost_s for entry in found] == sorted((entry.cost_s for entry in found), reverse=True)
    assert str(found) == "no rank holds up the others"  # which has lasted 0.6 s
    assert min(range(world.size), key=lambda rank: waited[rank].seconds) == late
    assert {w.count for w in waited} == {STEPS}


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_step_whose_start_is_late(world: World, shared_memory: bool) -> None:
    with settings(EACH_ITS_OWN, shared_memory=shared_memory):
        train(STEPS, lambda: time.sleep(LATE_S * (world.rank == 1)), 0)
        found = report(STEPS, "steps")
    assert found[0].rank == 1
    assert found[0].share > 0.5
    assert found[0].lateness_ms > 10
    assert found[0].count == STEPS
    assert "already at the first bucket (fourth.weight)" in found[0].where


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_slow_part_of_backward(world: World, shared_memory: bool) -> None:
    with settings(EACH_ITS_OWN, shared_memory=shared_memory):
        train(STEPS, lambda: None, LATE_S * (world.rank == world.size - 1))
        found = report(STEPS, "steps")
    assert found[0].rank == world.size - 1
    assert found[0].lateness_ms > 10
    assert "first seen on second.weight, bucket 3 of 4" in found[0].where


@pytest.mark.ranks(1)
def test_one_rank_waits_for_nobody(world: World) -> None:
    with settings():
        for _ in range(3):
            collective.allreduce(np.ones(3))
        assert collective.stragglers() == []
        assert ledger.local() == ledger.Waited(0, 0.0)
    with pytest.raises(collective.NotInitializedError):
        run_without_runtime(collective.stragglers)


def run_without_runtime(call: Callable[[], object]) -> None:
    collective.shutdown()
    try:
        call()
    finally:
        collective.init()


@pytest.mark.ranks(3)
def test_a_process_set_has_its_own(world: World) -> None:
    """Told to its ranks, by its first rank, in the job's numbers."""
    with settings():
        pair = collective.add_process_set([1, 2])
        if world.rank > 0:
            for _ in range(STEPS):
                time.sleep(LATE_S * (world.rank == 2))
                collective.allreduce(np.ones(3) * world.rank, name="x", process_set=pair)
            found = report(STEPS, "operations of process set [1, 2]")
            assert (found[0].rank, found[0].count) == (2, STEPS)
            assert found[0].lateness_ms > 10
        world.comm.Barrier()
        collective.remove_process_set(pair)
        assert world.rank != 1 or ledger._read(collective.runtime.current().engine.ledgers(10.0))[0].rank == 2


@pytest.mark.ranks(2)
def test_where_a_rank_has_joined_nothing_counts(world: World) -> None:
    with settings():
        for step in range(STEPS):
            if world.rank == 0 or step < 5:
                time.sleep(LATE_S * world.rank)
                collective.allreduce(np.ones(3), name="x")
        collective.join()
        for _ in range(10):
            time.sleep(LATE_S * world.rank)
            collective.allreduce(np.ones(3), name="y")
        found = report(15, "operations")
    assert (found[0].rank, found[0].count) == (1, 15)


@pytest.mark.ranks(2)
def test_of_many_operations_some_are_recorded(world: World) -> None:
    """Which stand for all: more than a thousand are counted, as well as that goes."""
    many = 6000
    with settings():
        for step in range(many):
            if step < STEPS and world.rank == 1:
                time.sleep(LATE_S)
            collective.allreduce(np.ones(1), name="x")
        collective.barrier(name="end")
        found = report(round(0.85 * many), "operations")
        assert 1 in [entry.rank for entry in found]  # the other one may be late, too, on a busy machine
        assert found[0].count == pytest.approx(many, rel=0.15)
        assert ledger.local().count == many + 1


@pytest.mark.ranks(2)
def test_an_answer_needs_no_script(world: World) -> None:
    """Rank 0 computes, or waits for something else; it has nothing to do with the question."""
    with settings():
        for _ in range(STEPS):
            time.sleep(LATE_S * world.rank)
            collective.allreduce(np.ones(1), name="x")
        if world.rank == 0:
            world.comm.recv(source=1)
        else:
            assert report(STEPS, "operations")[0].rank == 1
            world.comm.send("told", dest=0)


# ---- in words ----


def steps(plan: int, bucket: str, cost: float, seen: int = 20) -> tuple[object, ...]:
    """The only bucket but one of a plan, at whose end rank 1 was last; it stands for 100 steps."""
    late = [(1, "n1", seen, 100.0, cost, "")]
    first = (plan << 32, f"{bucket}.bucket0 (head.bias, plan_head.weight)", 100.0, [])
    return first, (plan << 32 | 3, f"{bucket}.bucket1 (net.plan.b to net.planner.a, 9 parameters)", 100.0, late)


def test_buckets_tell_their_optimizer_and_their_parameters() -> None:
    parts = [*steps(1, "optimizer.0.plan0.1", 3.0), *steps(2, "optimizer.1.plan7.2", 2.0)]
    found = ledger._read([("", 2, 10.0, parts)])  # type: ignore[list-item]
    assert [entry.what for entry in found] == ["steps of optimizer.0", "steps of optimizer.1"]
    assert found[0].where.startswith("first seen on the last bucket (net.*): ")
    assert ledger._parameters("b (fc.weight)") == "fc.weight"
    assert ledger._parameters("b (fc.weight, fc.bias)") == "fc.*"
    assert ledger._parameters("b (z.weight to a.bias, 3 parameters)") == "z.weight to a.bias"
    assert ledger._parameters("b") == "b"


def test_no_cost_exceeds_the_time_that_has_passed() -> None:
    (entry,) = ledger._read([("", 2, 10.0, list(steps(1, "optimizer.0.plan0.1", 300.0)))])  # type: ignore[list-item]
    assert (entry.cost_s, entry.excess_s, entry.lateness_ms) == (10.0, 10.0, 3000.0)
    assert entry.is_notable


def test_what_was_seen_a_few_times_is_not_notable() -> None:
    parts = list(steps(1, "optimizer.0.plan0.1", 9.0, seen=9))
    (entry,) = ledger._read([("", 2, 10.0, parts)])  # type: ignore[list-item]
    assert entry.share * entry.count == 100
    assert not entry.is_notable


# ---- at the end ----

AT_THE_END = """
import sys, time
import numpy as np
import collective
collective.init()
for step in range(50):
    time.sleep(0.03 * (collective.rank() == int(sys.argv[1])))
    collective.allreduce(np.ones(3), name="x")
"""
TOLD = "was last in"


def test_the_end_tells_once() -> None:
    job = run_ranks(3, ["-c", AT_THE_END, "2"], timeout=60)
    assert job.stderr.count(TOLD) == 1, job.stderr
    assert "rank 0: rank 2 (" in job.stderr
    assert "% of 50 operations, by " in job.stderr
    assert "longest at x. (COLLECTIVE_STRAGGLERS=0: not told)" in job.stderr


def test_the_end_says_nothing_of_even_ranks() -> None:
    assert TOLD not in run_ranks(3, ["-c", AT_THE_END, "-1"], timeout=60).stderr


def test_the_end_says_nothing_where_that_is_not_wanted() -> None:
    job = run_ranks(3, ["-c", AT_THE_END, "2"], timeout=60, env={"COLLECTIVE_STRAGGLERS": "0"})
    assert TOLD not in job.stderr


TORCH = """
import sys, time
import torch, torch.distributed as dist
import collective.torch
dist.init_process_group("collective")
late = dist.get_world_size() - 1
for step in range(50):
    time.sleep(0.03 * (dist.get_rank() == late))
    dist.all_reduce(torch.ones(3) * step)
dist.destroy_process_group()
"""


def test_groups_of_torch_distributed() -> None:
    job = run_ranks(2, ["-c", TORCH], timeout=100)
    assert job.stderr.count(TOLD) == 1, job.stderr
    assert "rank 1 (" in job.stderr
    assert "longest at allreduce" in job.stderr


ON_HOSTS = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_stragglers
import collective.torch as hvd
hvd.init()
test_stragglers.train(50, lambda: time.sleep(0.03 * (hvd.rank() == 3)), 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(WHY_NOT), reason=f"no cluster here: {WHY_NOT}")
@pytest.mark.parametrize("script", [ON_HOSTS, TORCH], ids=["optimizer", "torch.distributed"])
def test_two_hosts(script: str) -> None:
    with Cluster([2, 2], rate=None) as cluster:
        job = cluster.start([sys.executable, "-c", script], stdout=subprocess.PIPE)
        output, _ = job.communicate(timeout=100)
        assert job.returncode == 0, output
    assert output.count(TOLD) == 1, output
    assert "rank 3 (host1) was last in " in output
