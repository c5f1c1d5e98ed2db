"""The backend of torch.distributed: every operation, every type, order, groups, futures, and what goes wrong."""

import gc
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import collective
import collective.torch as hvd
from collective import runtime
from harness.plugin import World
from matrix import transport  # noqa: F401

pytestmark = [
    pytest.mark.ranks(1, 2, 3, 4),
    pytest.mark.usefixtures("transport", "group"),
    # all_gather_into_tensor and reduce_scatter_tensor, which older torch has no other names for
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
MOVED_ONLY = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]
COMPUTED = [*INTEGERS, *FLOATS, *COMPLEX, torch.bool]
EVERY = [*COMPUTED, *MOVED_ONLY]
LENGTHS = [0, 1, 7, 1000, 300_001]


@pytest.fixture
def group(world: World) -> Iterator[None]:
    """The default process group."""
    dist.init_process_group("collective", timeout=timedelta(seconds=30))
    yield
    dist.destroy_process_group()


def numbers(n: int, rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small whole numbers that differ by rank and index."""
    whole = (torch.arange(n) * 7 + rank * 3) % 11
    if dtype == torch.bool:
        return whole % 3 == 0
    if dtype in MOVED_ONLY:
        return whole.to(torch.uint8).repeat_interleave(dtype.itemsize).view(dtype)
    return whole.to(dtype)


def bits(x: torch.Tensor) -> list[int]:
    """What can be compared whatever the type."""
    items: list[int] = x.contiguous().view(torch.uint8).tolist() if x.numel() else []
    return items


def alike(x: torch.Tensor, y: torch.Tensor) -> None:
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)) if x.numel() else True


OPERATORS: dict[Any, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.PRODUCT: torch.mul,
    dist.ReduceOp.MIN: torch.minimum,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.BAND: torch.bitwise_and,
    dist.ReduceOp.BOR: torch.bitwise_or,
    dist.ReduceOp.BXOR: torch.bitwise_xor,
}
BITWISE = [dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR]


def is_defined(op: Any, dtype: torch.dtype) -> bool:
    if op in BITWISE:
        return dtype in INTEGERS or dtype == torch.bool
    return dtype not in COMPLEX or op == dist.ReduceOp.SUM  # torch itself refuses products


def reduced(op: Any, n: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    total = numbers(n, 0, dtype)
    for rank in range(1, size):
        total = OPERATORS[op](total, numbers(n, rank, dtype))
    return total


def test_all_reduce_of_every_type_and_operator(world: World) -> None:
    for dtype, op in itertools.product(COMPUTED, OPERATORS):
        if not is_defined(op, dtype):
            continue
        if op == dist.ReduceOp.PRODUCT and dtype in (torch.float16, torch.bfloat16):
            continue  # 10^4 has no exact bfloat16
        for n in (0, 1, 1000):
            x = numbers(n, world.rank, dtype)
            dist.all_reduce(x, op)
            expected = reduced(op, n, world.size, dtype)
            if dtype == torch.bool and op == dist.ReduceOp.SUM:
                expected = expected > 0
            alike(x, expected)


def test_averages_and_factors(world: World) -> None:
    total = reduced(dist.ReduceOp.SUM, 1000, world.size, torch.float64)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = numbers(1000, world.rank, dtype)
        dist.all_reduce(x, dist.ReduceOp.AVG)
        torch.testing.assert_close(x, (total / world.size).to(dtype))
        x = numbers(1000, world.rank, dtype)
        dist.all_reduce(x, dist._make_nccl_premul_sum(0.25))
        torch.testing.assert_close(x, (total / 4).to(dtype))


def test_long_tensors(world: World) -> None:
    for n in LENGTHS:
        x = numbers(n, world.rank)
        dist.all_reduce(x)
        alike(x, reduced(dist.ReduceOp.SUM, n, world.size, torch.float32))
        for root in range(world.size):
            x = numbers(n, world.rank)
            dist.broadcast(x, root)
            alike(x, numbers(n, root))


def test_movement_of_every_type(world: World) -> None:
    size, rank = world.size, world.rank
    for dtype in EVERY:
        n = 5
        x = numbers(n, size - 1, dtype) if rank == size - 1 else torch.zeros(n, dtype=torch.uint8).to(dtype)
        dist.broadcast(x, size - 1)
        alike(x, numbers(n, size - 1, dtype))

        each = [numbers(n, peer, dtype) for peer in range(size)]
        into = torch.empty(size * n, dtype=dtype)
        dist.all_gather_into_tensor(into, numbers(n, rank, dtype))
        assert bits(into) == [bit for part in each for bit in bits(part)]

        uneven = [torch.empty(peer + 1, dtype=dtype) for peer in range(size)]
        dist.all_gather(uneven, numbers(rank + 1, rank, dtype))
        for peer, part in enumerate(uneven):
            alike(part, numbers(peer + 1, peer, dtype))

        for root in range(size):
            parts = [torch.empty(n, dtype=dtype) for _ in range(size)] if rank == root else None
            dist.gather(numbers(n, rank, dtype), parts, root)
            for peer, part in enumerate(parts or []):
                alike(part, numbers(n, peer, dtype))
            y = torch.empty(n, dtype=dtype)
            dist.scatter(y, each if rank == root else None, root)
            alike(y, each[rank])

        out = torch.empty(size * n, dtype=dtype)
        dist.all_to_all_single(out, torch.cat([numbers(n, rank + peer, dtype) for peer in range(size)]))
        assert bits(out) == [bit for peer in range(size) for bit in bits(numbers(n, peer + rank, dtype))]


def test_uneven_all_to_all(world: World) -> None:
    size, rank = world.size, world.rank

    def count(source: int, target: int) -> int:
        return (2 * source + 3 * target) % 4

    sent = [count(rank, peer) for peer in range(size)]
    received = [count(peer, rank) for peer in range(size)]
    x = torch.stack([numbers(3, rank * 10 + i) for i in range(sum(sent))]) if sum(sent) else torch.empty(0, 3)
    out = torch.full((sum(received), 3), -1.0)
    dist.all_to_all_single(out, x, received, sent)
    rows = []
    for peer in range(size):
        first = sum(count(peer, target) for target in range(rank))
        rows += [numbers(3, peer * 10 + i) for i in range(first, first + count(peer, rank))]
    alike(out, torch.stack(rows) if rows else torch.empty(0, 3))

    outs = [torch.empty(count(peer, rank)) for peer in range(size)]
    dist.all_to_all(outs, [numbers(count(rank, peer), rank + peer) for peer in range(size)])
    for peer, part in enumerate(outs):
        alike(part, numbers(count(peer, rank), peer + rank))


def test_reduce_and_reduce_scatter(world: World) -> None:
    size, rank = world.size, world.rank
    for root in range(size):
        x = numbers(100, rank)
        dist.reduce(x, root)
        alike(x, reduced(dist.ReduceOp.SUM, 100, size, torch.float32) if rank == root else numbers(100, rank))
    total = reduced(dist.ReduceOp.SUM, 40 * size, size, torch.float32)
    out = torch.empty(40)
    dist.reduce_scatter_tensor(out, numbers(40 * size, rank))
    alike(out, total[40 * rank : 40 * (rank + 1)])
    dist.reduce_scatter_tensor(out, numbers(40 * size, rank), dist.ReduceOp.AVG)
    torch.testing.assert_close(out, total[40 * rank : 40 * (rank + 1)] / size)
    lengths = [7 * peer + 1 for peer in range(size)]
    out = torch.empty(lengths[rank])
    dist.reduce_scatter(out, [numbers(n, rank + peer) for peer, n in enumerate(lengths)])
    alike(out, sum((numbers(lengths[rank], peer + rank) for peer in range(size)), torch.zeros(lengths[rank])))


def test_tensors_that_are_not_contiguous_and_list_elements_that_are(world: World) -> None:
    size, rank = world.size, world.rank
    x = numbers(12, rank).view(3, 4).t()
    dist.all_reduce(x)
    alike(x, reduced(dist.ReduceOp.SUM, 12, size, torch.float32).view(3, 4).t())
    whole = torch.zeros(size, 2, 6)
    dist.all_gather(list(whole.unbind(0)), numbers(12, rank).view(6, 2).t())
    for peer in range(size):
        alike(whole[peer], numbers(12, peer).view(6, 2).t())


def test_several_at_a_time_finish_in_any_order(world: World) -> None:
    works = []
    tensors = [numbers(n, world.rank) for n in (5, 100_000, 0, 33, 1)]
    for x in tensors:
        works.append(dist.all_reduce(x, async_op=True))
    for work in reversed(works):
        assert work is not None
        work.wait()
        assert work.is_completed()
        assert work.is_success()
        assert work.exception() is None
    for x in tensors:
        alike(x, reduced(dist.ReduceOp.SUM, len(x), world.size, torch.float32))


def test_coalesced(world: World) -> None:
    tensors = [numbers(n, world.rank) for n in (5, 1000)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for x in tensors:
            dist.all_reduce(x)
    manager.wait()
    for x in tensors:
        alike(x, reduced(dist.ReduceOp.SUM, len(x), world.size, torch.float32))
    outs = [torch.empty(world.size * n) for n in (3, 4)]
    with dist._coalescing_manager():
        for n, out in zip((3, 4), outs, strict=True):
            dist.all_gather_into_tensor(out, numbers(n, world.rank))
    for n, out in zip((3, 4), outs, strict=True):
        alike(out, torch.cat([numbers(n, rank) for rank in range(world.size)]))
    with dist._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        y = numbers(9, world.rank)
        dist.broadcast(y, 0)
    manager.wait()
    alike(y, numbers(9, 0))


def test_objects_and_barriers(world: World) -> None:
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, {"rank": world.rank, "pad": "x" * world.rank * 1000})
    assert [one["rank"] for one in everyone] == list(range(world.size))
    said = [("from", 0), [1, 2]] if world.rank == 0 else [None, None]
    dist.broadcast_object_list(said, 0)
    assert said == [("from", 0), [1, 2]]
    into: list[Any] = [None]
    dist.scatter_object_list(into, [f"for {peer}" for peer in range(world.size)] if world.rank == 0 else None, 0)
    assert into == [f"for {world.rank}"]
    for _ in range(3):
        dist.barrier()


def test_sums_of_sparse_tensors(world: World) -> None:
    dense = torch.zeros(6, 2)
    rows = [world.rank, (world.rank + 2) % 6, 5]
    x = torch.sparse_coo_tensor([rows], [[1.0, r] for r in rows], (6, 2), check_invariants=True)
    for rank in range(world.size):
        for row in (rank, (rank + 2) % 6, 5):
            dense[row] += torch.tensor([1.0, row])
    dist.all_reduce(x)
    alike(x.to_dense(), dense)


@pytest.mark.ranks(2, 3, 4)
def test_messages_between_two(world: World) -> None:
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    counts = [0, 1, 1000, 400_000, 5]
    works = [dist.isend(numbers(n, world.rank + i), right, tag=i % 2) for i, n in enumerate(counts)]
    into = [torch.empty(n) for n in counts]
    works += [dist.irecv(x, left, tag=i % 2) for i, x in enumerate(into)]
    for work in works:
        assert work is not None
        work.wait()
    for i, x in enumerate(into):
        alike(x, numbers(counts[i], left + i))
    x, y = numbers(10, world.rank), torch.empty(10)
    operations = [dist.P2POp(dist.isend, x, right), dist.P2POp(dist.irecv, y, left)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    alike(y, numbers(10, left))


@pytest.mark.ranks(2, 3, 4)
def test_messages_from_whoever_sends(world: World) -> None:
    for round_ in range(3):
        if world.rank == 0:
            seen = set()
            for _ in range(world.size - 1):
                x = torch.empty(50)
                source = dist.recv(x, tag=3)
                alike(x, numbers(50, source + round_))
                seen.add(source)
            assert seen == set(range(1, world.size))
        else:
            dist.send(numbers(50, world.rank + round_), 0, tag=3)
        dist.barrier()  # the next round's are not to be received in this one


def test_futures_and_their_callbacks(world: World) -> None:
    def halved(future: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        return future.value()[0] / 2

    for n in (4, 200_000):
        work = dist.all_reduce(numbers(n, world.rank), async_op=True)
        assert work is not None
        half = work.get_future().then(halved)
        alike(half.wait(), reduced(dist.ReduceOp.SUM, n, world.size, torch.float32) / 2)
    # What has no memory of its own to go to is stored although nobody waits.
    parts = [torch.full((4,), -1.0) for _ in range(world.size)]
    dist.all_gather(parts, numbers(4, world.rank), async_op=True)
    deadline = time.monotonic() + 10
    while any(part.eq(-1).any() for part in parts) and time.monotonic() < deadline:
        time.sleep(0.001)
    for rank, part in enumerate(parts):
        alike(part, numbers(4, rank))


@pytest.mark.ranks(2, 3, 4)
def test_groups_are_independent_and_made_by_their_members(world: World) -> None:
    evens = dist.new_group(list(range(0, world.size, 2)))
    again = dist.new_group(list(range(0, world.size, 2)))  # of the same ranks
    pairs = [dist.new_group([0, rank], use_local_synchronization=True) for rank in range(1, world.size)]
    if world.rank % 2 == 0:
        members = range(0, world.size, 2)
        x, y = numbers(10, world.rank), numbers(20, world.rank)
        later = dist.all_reduce(y, group=again, async_op=True)
        dist.all_reduce(x, group=evens)
        assert later is not None
        later.wait()
        for tensor in (x, y):
            alike(tensor, sum((numbers(len(tensor), rank) for rank in members), torch.zeros(len(tensor))))
        z = numbers(5, world.rank)
        dist.broadcast(z, members[-1], group=evens)  # ranks of the job
        alike(z, numbers(5, members[-1]))
    for rank, pair in enumerate(pairs, 1):
        if world.rank in (0, rank):
            x = numbers(10, world.rank)
            dist.all_reduce(x, group=pair)
            alike(x, numbers(10, 0) + numbers(10, rank))
    dist.barrier()
    # Groups in different order on different ranks do not wait for each other.
    first, second = (evens, again) if world.rank == 0 else (again, evens)
    if world.rank % 2 == 0:
        x, y = numbers(3, world.rank), numbers(3, world.rank)
        works = [dist.all_reduce(x, group=first, async_op=True), dist.all_reduce(y, group=second, async_op=True)]
        for work in works:
            assert work is not None
            work.wait()
        alike(x, y)


def test_groups_come_and_go(world: World) -> None:
    for _ in range(20):
        group = dist.new_group(list(range(world.size)))
        x = torch.ones(100)
        dist.all_reduce(x, group=group)
        alike(x, torch.full((100,), float(world.size)))
        dist.destroy_process_group(group)
        with pytest.raises((collective.ShutdownError, ValueError), match=r"destroyed|not part of|Invalid|invalid"):
            group.allreduce([x]).wait()
        del group
    gc.collect()


def test_beside_horovods_functions(world: World) -> None:
    x, y = numbers(10, world.rank), numbers(10, world.rank)
    work = dist.all_reduce(x, async_op=True)
    alike(hvd.allreduce(y, op=hvd.Sum), reduced(dist.ReduceOp.SUM, 10, world.size, torch.float32))
    assert work is not None
    work.wait()
    alike(x, reduced(dist.ReduceOp.SUM, 10, world.size, torch.float32))


def test_ddp_equals_one_process(world: World) -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 3)).double()

    torch.manual_seed(2)
    x, y = torch.randn(world.size * 4, 20, dtype=torch.float64), torch.randn(world.size * 4, 3, dtype=torch.float64)
    alone, shared = model(), torch.nn.parallel.DistributedDataParallel(model(), bucket_cap_mb=0.001)
    mine = slice(4 * world.rank, 4 * world.rank + 4)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (alone, shared)]
    for _ in range(5):
        for optimizer, m, part in zip(optimizers, (alone, shared), (slice(None), mine), strict=True):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(m(x[part]), y[part]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for a, b in zip(alone.parameters(), shared.parameters(), strict=True):
        assert float((a - b).detach().abs().max()) < 1e-12


# ---- what goes wrong ----


@pytest.mark.ranks(2, 3)
def test_differences_are_errors_on_all_ranks(world: World) -> None:
    last = world.rank == world.size - 1
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: dist.all_reduce(torch.ones(4 if last else 3)), r"shape differs: \(3,\) on .*; \(4,\) on rank"),
        (lambda: dist.all_reduce(torch.ones(3, dtype=torch.int32 if last else torch.float32)), "dtype differs"),
        (
            lambda: dist.all_reduce(torch.ones(3), dist.ReduceOp.MAX if last else dist.ReduceOp.SUM),
            "reduction differs: Sum on .*; Max",
        ),
        (lambda: dist.broadcast(torch.ones(3), 1 if last else 0), "root_rank differs: 0 on .*; 1 on"),
        (lambda: dist.barrier() if last else dist.all_reduce(torch.ones(3)), r"operation differs"),
        (
            lambda: dist.all_gather(
                [torch.empty(2 + (last and not peer)) for peer in range(world.size)], torch.ones(2)
            ),
            "differs",
        ),
    ]
    if not runtime.current().engine.shares_memory():
        pytest.skip("between nodes a difference ends the engine: see test_torch_distributed_jobs.py")
    for call, pattern in wrong:
        with pytest.raises(collective.MismatchError, match=pattern) as caught:
            call()
        assert "default process group" in str(caught.value)
        x = torch.ones(3)
        dist.all_reduce(x)  # the group goes on
        alike(x, torch.full((3,), float(world.size)))


def test_wrong_arguments_are_errors_at_once(world: World) -> None:
    size = world.size
    group = dist.group.WORLD
    assert group is not None
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: group._allgather_base(torch.empty(size * 3 + 1), torch.ones(3)), r"output has \d+ elements"),
        (lambda: group._reduce_scatter_base(torch.empty(3), torch.ones(size * 3 + 1)), r"input has \d+ elements"),
        (lambda: group.allgather([[torch.empty(3)] * (size + 1)], [torch.ones(3)]), f"each of {size} ranks"),
        (lambda: group.allgather([[torch.empty(3).int()] * size], [torch.ones(3)]), "torch.int32 .* torch.float32"),
        (lambda: group.alltoall_base(torch.empty(size), torch.ones(size), [2] * size, []), "splits"),
        (lambda: group.allreduce([torch.ones(3), torch.ones(3)]), "takes one element"),
        (lambda: group.allreduce([torch.ones(3, device="meta")]), "meta"),
        (lambda: group.allreduce([torch.ones(3)], dist.ReduceOp.BAND), "BitAnd is not defined for float32"),
        (lambda: group.allreduce([torch.ones(3).to(torch.float8_e4m3fn)]), "not defined for torch.float8_e4m3fn"),
        (lambda: group.send([torch.ones(3)], world.rank, 0), "no other rank"),
        (lambda: group.recv([torch.ones(3)], size, 0), "no other rank"),
        (lambda: group.recv_anysource([torch.ones(3)], 5000), "tag 5000"),
        (lambda: group.broadcast([torch.ones(3)], _root(size)), f"root rank {size}"),
    ]
    for call, pattern in cases:
        with pytest.raises(collective.CollectiveError, match=pattern) as caught:
            call()
        assert f"rank {world.rank}" in str(caught.value)
    x = torch.ones(3)
    dist.all_reduce(x)
    alike(x, torch.full((3,), float(size)))


def _root(rank: int) -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = rank
    return options


@pytest.mark.ranks(2)
def test_a_wait_with_a_timeout_gives_up_alone(world: World) -> None:
    x = torch.ones(3)
    if world.rank == 0:
        work = dist.all_reduce(x, async_op=True)
        assert work is not None
        with pytest.raises(TimeoutError, match=r"did not finish within the timeout of 0\.2 s"):
            work.wait(timedelta(seconds=0.2))
        world.comm.Barrier()
        work.wait()
    else:
        world.comm.Barrier()
        dist.all_reduce(x)
    alike(x, torch.full((3,), 2.0))


def test_the_environment_for_other_backends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"]
    for name in names:
        monkeypatch.setenv(name, "to be overwritten")
    values = hvd.distributed_environment()
    assert list(values) == names
    assert (values["RANK"], values["WORLD_SIZE"]) == (str(world.rank), str(world.size))
    assert len(set(world.comm.allgather((values["MASTER_ADDR"], values["MASTER_PORT"])))) == 1
    dist.destroy_process_group()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ["GLOO_SOCKET_IFNAME"])  # to be taken back
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo")
    x = torch.ones(3)
    dist.all_reduce(x)
    alike(x, torch.full((3,), float(world.size)))
