"""Process sets: overlapping ones at the same time, every collective on them, and what is refused."""

import numpy as np
import pytest
import torch

import collective
import collective.torch as hvd
from collective import ProcessSet, Sum
from data import fill
from harness.plugin import World
from matrix import check

pytestmark = pytest.mark.ranks(3, 4)


def total(ranks: list[int], salt: int) -> np.ndarray:
    return sum(fill(50, "float64", rank, salt) for rank in ranks)  # type: ignore[return-value]


def test_overlapping_sets_work_at_the_same_time(world: World) -> None:
    sets = [collective.add_process_set(ranks) for ranks in ([0, 1], [2, 1], [0, world.size - 1])]
    mine = [s for s in (collective.global_process_set, *sets) if s.included()]
    for turn in range(20):
        handles = []
        for s in mine if turn % 2 else reversed(mine):
            x = fill(50, "float64", world.rank, turn)
            handles.append((s, collective.allreduce_async(x, Sum, name=f"x{turn}", process_set=s)))
        for s, handle in handles:
            check(handle.wait(), total(s.ranks, turn), 0, s, turn)
    for s in sets:
        assert collective.remove_process_set(s)
        assert not collective.remove_process_set(s)


@pytest.mark.ranks(4)
def test_overlapping_sets_of_four(world: World) -> None:
    pair = collective.add_process_set([3, 1])
    assert pair.ranks == [1, 3]
    assert pair.process_set_id is not None
    assert pair.rank() == {1: 0, 3: 1}.get(world.rank, -1)
    if pair.included():
        check(collective.allgather(np.array([world.rank]), process_set=pair), np.array([1, 3]), 0)
        check(collective.broadcast(np.array([world.rank]), 3, process_set=pair), np.array([3]), 0)
        rows, received = collective.alltoall(np.array([10, 11]) + world.rank, process_set=pair)
        check(rows, np.array([11, 13]) + pair.rank(), 0)
        assert received == [1, 1]
        check(
            collective.reducescatter(np.arange(4.0), Sum, process_set=pair),
            np.arange(4.0).reshape(2, 2)[pair.rank()] * 2,
            0,
        )
        result = collective.reduce(np.ones(2), 3, Sum, process_set=pair)
        assert (result is None) == (world.rank == 1)
        collective.barrier(process_set=pair)
        with pytest.raises(collective.InvalidArgumentError, match=r"root_rank 0 is not a rank of process set \[1, 3\]"):
            collective.broadcast(np.ones(1), 0, process_set=pair)
        with pytest.raises(collective.MismatchError, match="shape differs"):
            collective.allreduce(np.ones(world.rank), process_set=pair)
        check(collective.allreduce(np.ones(2), Sum, process_set=pair), np.full(2, 2), 0)
        assert collective.join(process_set=pair) in (1, 3)
    else:
        with pytest.raises(collective.InvalidArgumentError, match=r"not in process set \[1, 3\]"):
            collective.allreduce(np.ones(1), process_set=pair)
    collective.remove_process_set(pair)


def test_errors_name_the_set_and_the_ranks_of_the_job(world: World) -> None:
    """Not by their numbers within the set, which are 0 and 1."""
    last = world.size - 1
    some = collective.add_process_set([1, last])
    if some.included():
        with pytest.raises(collective.MismatchError) as shape:
            collective.allreduce(np.ones(world.rank), name="x", process_set=some)
        differs = f"shape differs: (1,) on rank 1; ({last},) on rank {last}"
        assert str(shape.value) == f"process set [{named(1, last)}]: allreduce 'x': {differs}"
        with pytest.raises(collective.MismatchError, match=f"root_rank differs: 1 on rank 1; {last} on rank {last}"):
            collective.broadcast(np.ones(1), world.rank, name="b", process_set=some)
        move, other = (collective.send, last) if world.rank == 1 else (collective.recv, 1)
        with pytest.raises(collective.MismatchError) as pair:
            move(np.ones(world.rank), other, process_set=some)  # the peer may leave the set before this rank looks
        verb = "send to" if world.rank == 1 else "recv from"
        told = f"process set [{named(1, last)}]: {verb} rank {other} on rank {world.rank}: {differs}"
        assert str(pair.value) == told
    collective.remove_process_set(some)


def named(first: int, last: int) -> str:
    """Two ranks, as messages write them."""
    return f"{first}, {last}"


def test_a_stall_in_one_set_does_not_hold_another(world: World) -> None:
    slow = collective.add_process_set([0, 1])
    fast = collective.add_process_set([0, 2])
    waiting = None
    if world.rank == 0:
        waiting = collective.allreduce_async(np.ones(3), Sum, name="slow", process_set=slow)
    if fast.included():
        for _ in range(10):
            check(collective.allreduce(np.ones(3), Sum, process_set=fast), np.full(3, 2), 0)
    collective.barrier()
    if world.rank == 1:
        waiting = collective.allreduce_async(np.ones(3), Sum, name="slow", process_set=slow)
    if waiting is not None:
        check(waiting.wait(), np.full(3, 2), 0)
    collective.remove_process_set(fast)
    collective.remove_process_set(slow)


def test_an_optimizer_on_a_set(world: World) -> None:
    some = collective.add_process_set([0, 2])
    if some.included():
        model = torch.nn.Linear(3, 2, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), process_set=some)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.full((1, 3), float(world.rank))).sum().backward()
            optimizer.step()
        check(model.weight.detach(), np.full((2, 3), -3.0), 0)  # the mean of 0 and 2, three times
    else:
        p = torch.nn.Parameter(torch.zeros(1))
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), process_set=some)
        (3 * p).sum().backward()
        optimizer.step()
        assert p.item() == -3  # a local one
    collective.remove_process_set(some)


def test_any_iterable_of_ranks(world: World) -> None:
    for given in (
        range(2),
        reversed(range(2)),
        {0, 1},
        (rank for rank in (1, 0)),
        np.arange(2),
        [np.int64(1), np.uint8(0)],
        torch.tensor([0, 1]),
    ):
        some = collective.add_process_set(ProcessSet(given) if isinstance(given, range) else given)
        assert some.ranks == [0, 1]
        assert repr(some) == "process set [0, 1]"
        if some.included():
            check(collective.allreduce(np.ones(2), Sum, process_set=some), np.full(2, 2), 0)
        collective.remove_process_set(some)
    for wrong in ([0.5], [True, False], "01", ["0"], [0, None], 1, None, np.array([0.0, 1.0]), [np.bool_(True)]):
        with pytest.raises(collective.InvalidArgumentError, match=r"a process set takes .*, not "):
            ProcessSet(wrong)
        with pytest.raises(collective.InvalidArgumentError, match=r"a process set takes .*, not "):
            collective.add_process_set(wrong)


def test_what_is_refused(world: World) -> None:
    for ranks in ([], [0, 0], [0, world.size], [-1]):
        with pytest.raises(collective.InvalidArgumentError, match="distinct ranks"):
            collective.add_process_set(ranks)
    with pytest.raises(collective.InvalidArgumentError, match="global process set is registered already"):
        collective.add_process_set(collective.global_process_set)
    assert collective.global_process_set.process_set_id == 0
    everyone = collective.add_process_set(list(range(world.size)))  # beside the global set
    with pytest.raises(collective.InvalidArgumentError, match="registered already"):
        collective.add_process_set(reversed(range(world.size)))
    collective.remove_process_set(everyone)
    with pytest.raises(collective.MismatchError, match="gave the ranks"):
        collective.add_process_set([0, 1 + (world.rank == 2)])
    with pytest.raises(collective.InvalidArgumentError, match="not registered"):
        collective.allreduce(np.ones(1), process_set=ProcessSet([0, 1]))
    with pytest.raises(collective.InvalidArgumentError, match="cannot be removed"):
        collective.remove_process_set(collective.global_process_set)


def test_sets_at_init_and_from_communicators(world: World) -> None:
    rank, size = world.rank, world.size
    collective.shutdown()
    split = world.comm.Split(rank % 2, rank)
    evens = ProcessSet([0, 2])
    collective.init(process_sets=[evens])
    assert evens.included() == (rank in (0, 2))
    if evens.included():
        check(collective.allreduce(np.array([rank]), Sum, process_set=evens), np.array([2]), 0)
    collective.remove_process_set(evens)
    # A communicator of the even ranks on them; the others know the same set by its ranks.
    evens = collective.add_process_set(ProcessSet(split) if rank % 2 == 0 else ProcessSet(list(range(0, size, 2))))
    assert evens.ranks == list(range(0, size, 2))
    assert (evens.mpi_comm is not None) == evens.included()
    collective.shutdown()
    assert evens.process_set_id is None
    collective.init(process_sets="dynamic")
    split.Free()


@pytest.mark.ranks(3)
def test_a_set_that_is_registered_again_under_an_optimizer(world: World) -> None:
    some = collective.add_process_set([0, 2])
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), process_set=some)
    for _ in range(2):
        optimizer.zero_grad()
        (p.sum() * (world.rank + 1)).backward()
        optimizer.step()
        collective.remove_process_set(some)
        collective.add_process_set(some)
    collective.remove_process_set(some)
    assert p[0].item() == -4.0  # the mean of 1 and 3, twice; on rank 1 its own 2, twice
