"""Arrays on devices: run by test_device.py on ranks, with stand-ins for CuPy and the driver, or with the real ones."""

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import cupy
import numpy as np
import pytest
import torch

import collective
import collective.torch as hvd
from collective import Average, Max, Min, Sum, _core, arrays, devices, process_sets, runtime
from data import fill
from harness.plugin import World
from matrix import transport  # noqa: F401

pytestmark = [pytest.mark.ranks(1, 2, 3, 4), pytest.mark.usefixtures("transport")]
needs_others = pytest.mark.ranks(2, 3, 4)  # in the place of the above

SIZES = [0, 1, 1000, 100_003, 9_000_001]  # elements: the last, of float32 alone, in several parts, or pieces
DEVICES = len(_core.devices()[0])
stand_in = ctypes.CDLL("libcuda.so.1")
SENDS = os.environ.get("COLLECTIVE_CUDA_AWARE") == "1"  # MPI, memory of devices
SHARES = "STAND_IN_CUDA_REFUSE" not in os.environ  # ranks of a node share it
NCCL = os.environ.get("COLLECTIVE_NCCL") == "1"
IS_REAL = not hasattr(stand_in, "standInWrite")


def put(values: Any, device: int = 0) -> Any:
    """On the device; the stand-in takes its time for that, on the current stream."""
    with cupy.cuda.Device(device):
        return cupy.asarray(values)


def same(got: Any, wanted: Any) -> None:
    assert isinstance(got, cupy.ndarray)
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got.get(), wanted)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (dtype, size)
        for dtype in ("float32", "float16", "int64", "bool", "complex64")
        for size in (SIZES if dtype == "float32" else SIZES[:-1])
    ],
)
def test_reductions(world: World, dtype: str, size: int) -> None:
    each = [fill(size, dtype, rank) for rank in range(world.size)]
    mine = each[world.rank]
    total = np.any(each, axis=0) if dtype == "bool" else np.sum(each, axis=0, dtype=dtype)
    same(collective.allreduce(put(mine), Sum), total)
    x = put(mine)
    assert collective.allreduce_(x, Sum) is x
    same(x, total)
    same(collective.reducescatter(put(mine), Sum), np.array_split(total, world.size)[world.rank])
    root = world.size - 1
    at_root = collective.reduce(put(mine), root, Sum)
    if world.rank == root:
        same(at_root, total)
    else:
        assert at_root is None
    if dtype not in ("bool", "complex64"):
        same(collective.allreduce(put(mine), Min), np.min(each, axis=0))
        same(collective.allreduce(put(mine), Max), np.max(each, axis=0))


def test_scaling_and_compression(world: World) -> None:
    each = [fill(50_000, "float32", rank) for rank in range(world.size)]
    mean = (np.sum(each, axis=0) / np.float32(world.size)).astype("float32")
    x = put(each[world.rank])
    np.testing.assert_allclose(collective.allreduce(x, Average).get(), mean, rtol=1e-6)
    same(collective.allreduce(x, Sum, prescale_factor=0.5), np.sum(each, axis=0) / np.float32(2))
    np.testing.assert_allclose(collective.allreduce(x, Average, compression="fp16").get(), mean, atol=2e-2)
    same(collective.allreduce(x, collective.Adasum), collective.allreduce(each[world.rank], collective.Adasum))


@pytest.mark.parametrize("rows", [0, 1, 5, 3000, 600_000])
def test_movement(world: World, rows: int) -> None:
    root = world.size // 2
    each = [fill((rows + rank, 2), "float32", rank) for rank in range(world.size)]
    mine = put(each[world.rank])
    everything = np.concatenate(each)
    same(collective.allgather(mine), everything)
    gathered = collective.gather(mine, root)
    if world.rank == root:
        same(gathered, everything)
    same(collective.scatter(mine, root), np.array_split(each[root], world.size)[world.rank])
    even = [fill((rows // world.size * world.size, 3), "int32", rank) for rank in range(world.size)]
    received, counts = collective.alltoall(put(even[world.rank]))
    same(received, np.concatenate([np.split(x, world.size)[world.rank] for x in even]))
    assert sum(counts) == len(received.get())
    x = put(fill((rows, 4), "float64", world.rank))
    same(collective.broadcast(x, root), fill((rows, 4), "float64", root))
    same(x, fill((rows, 4), "float64", world.rank))
    collective.broadcast_(x, root)
    same(x, fill((rows, 4), "float64", root))


@pytest.mark.skipif(IS_REAL, reason="needs the stand-in")
def test_page_locked_memory_is_bounded(world: World) -> None:
    """A model that is broadcast takes no more of it than what is on its way."""
    stand_in.standInPinned.restype = ctypes.c_size_t
    before = stand_in.standInPinned()
    xs = [put(np.full(5_000_000, world.rank * 100 + i, "float32")) for i in range(25)]  # 20 MB each
    for handle in [collective.broadcast_async_(x, 0, name=f"layer.{i}") for i, x in enumerate(xs)]:
        handle.wait()
    for i, x in enumerate(xs):
        assert (x.get() == i).all()
    assert stand_in.standInPinned() - before < 300 << 20


@needs_others
def test_send_and_receive(world: World) -> None:
    if world.rank == 0:
        collective.send(put(np.arange(9.0)), 1)
        with pytest.raises(collective.MismatchError):
            collective.send(put(np.arange(9.0)), 1)
    elif world.rank == 1:
        x = put(np.zeros(9))
        collective.recv(x, 0)
        same(x, np.arange(9.0))
        with pytest.raises(collective.MismatchError):
            collective.recv(np.zeros(9), 0)


def test_work_that_is_queued_comes_first(world: World) -> None:
    """Written on a stream of the caller's just before; read on another one just after."""
    for step in range(5):
        own, other = cupy.cuda.Stream(), cupy.cuda.Stream()
        x = put(np.zeros(200_000, "float32"))
        x.get()
        with own:
            x.set(fill(200_000, "float32", world.rank, step))
            handle = collective.allreduce_async(x, Sum, name="queued")
            y = put(fill(10, "float64", world.rank, step))
            collective.broadcast_(y, 0)
        with other:
            same(handle.wait(), np.sum([fill(200_000, "float32", rank, step) for rank in range(world.size)], axis=0))
            same(y, fill(10, "float64", 0, step))


def test_results_are_there_for_every_stream(world: World) -> None:
    """Also those that their framework makes of bytes on the host."""
    own, other = cupy.cuda.Stream(), cupy.cuda.Stream()
    each = [fill(5000, "float32", rank) for rank in range(world.size)]
    for _ in range(5):
        with own:
            x = put(each[world.rank])
            gathered = collective.allgather(x)
            total = collective.allreduce(x, Sum)
        with other:
            same(gathered, np.concatenate(each))
            same(total, np.sum(each, axis=0))


def test_a_stream_that_is_slow_holds_up_its_own_work_only(world: World) -> None:
    slow, quick = cupy.cuda.Stream(), cupy.cuda.Stream()
    with slow:
        x = put(np.zeros(10, "float32"))
        if not IS_REAL:
            stand_in.standInHold(ctypes.c_void_p(slow.ptr))
        x.set(fill(10, "float32", world.rank, 99))
        late = collective.allreduce_async(x, Sum, name="late")
    with quick:
        for step in range(3):
            wanted = np.sum([fill(9, "int64", rank, step) for rank in range(world.size)], axis=0)
            same(collective.allreduce(put(fill(9, "int64", world.rank, step)), Sum), wanted)
        if not IS_REAL:
            assert not late.poll()
            stand_in.standInRelease()
    same(late.wait(), np.sum([fill(10, "float32", rank, 99) for rank in range(world.size)], axis=0))


@pytest.fixture
def impatient(transport: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:  # noqa: F811
    """The runtime warns after a second, and gives up after another one."""
    collective.shutdown()
    monkeypatch.setenv("COLLECTIVE_TIMEOUT", "2")
    monkeypatch.setenv("COLLECTIVE_STALL_WARNING", "1")
    monkeypatch.setenv("COLLECTIVE_OUT_OF_BAND", "0")
    collective.init()
    yield
    collective.shutdown()
    monkeypatch.undo()
    collective.init()


@pytest.mark.skipif(IS_REAL, reason="needs the stand-in")
def test_a_stream_that_does_not_get_there(world: World, impatient: None, capfd: pytest.CaptureFixture[str]) -> None:
    stream = cupy.cuda.Stream()
    x = put(np.ones(3))
    stand_in.standInHold(ctypes.c_void_p(stream.ptr))
    with stream, pytest.raises(collective.CollectiveTimeoutError, match=r"'held': waits for .* queued on device 0"):
        collective.allreduce(x, Sum, name="held")
    assert "stalled: allreduce 'held': waits for what its user has queued on device 0" in capfd.readouterr().err
    stand_in.standInRelease()
    same(collective.allreduce(x, Sum, name="held"), np.full(3, float(world.size)))


@pytest.mark.skipif(IS_REAL, reason="needs the stand-in")
def test_a_stream_that_is_captured(world: World) -> None:
    stream = cupy.cuda.Stream()
    x = put(np.ones(3))
    stand_in.standInCapture(ctypes.c_void_p(stream.ptr))
    try:
        with stream, pytest.raises(collective.InvalidArgumentError, match="captured into a CUDA graph"):
            collective.allreduce(x, Sum, name="captured")
    finally:
        stand_in.standInCapture(None)
    same(collective.allreduce(x, Sum, name="captured"), np.full(3, float(world.size)))


def test_many_at_once_on_several_devices_and_the_host(world: World) -> None:
    handles = []
    order = list(range(60))
    np.random.default_rng(world.rank).shuffle(order)
    for number in order:
        values = fill(number * 37, "float32", world.rank, number)
        x = values if number % 3 == 0 else put(values, number % DEVICES)
        handles.append((number, x, collective.allreduce_async(x, Sum, name=f"many.{number}")))
    for number, x, handle in handles:
        result = handle.wait()
        wanted = np.sum([fill(number * 37, "float32", rank, number) for rank in range(world.size)], axis=0)
        if number % 3 == 0:
            np.testing.assert_array_equal(result, wanted)
        else:
            assert result.device.id == x.device.id
            same(result, wanted)
    arrays = [put(fill(n, "float32", world.rank), n % DEVICES) for n in (5, 70_000, 0, 123)]
    for result, n in zip(collective.grouped_allreduce(arrays, Sum), (5, 70_000, 0, 123), strict=True):
        same(result, np.sum([fill(n, "float32", rank) for rank in range(world.size)], axis=0))


def test_handles_that_are_dropped(world: World) -> None:
    for number in range(8):
        collective.allreduce_async(put(np.ones(30_000)), Sum, name=f"dropped.{number}")
        gc.collect()
    same(collective.allreduce(put(np.ones(10)), Sum), np.full(10, float(world.size)))


@needs_others
def test_ranks_on_different_kinds_of_memory(world: World) -> None:
    x = np.ones(4) if world.rank == 0 else put(np.ones(4))
    with pytest.raises(collective.MismatchError, match=r"device.*cpu.*cuda"):
        collective.allreduce(x, Sum, name="mixed")


def test_other_arrays_of_devices(world: World) -> None:
    class Foreign:
        def __init__(self, x: Any) -> None:
            self.x = x
            self.__cuda_array_interface__ = {
                "shape": x.shape,
                "typestr": x.dtype.str,
                "data": (x.data.ptr, False),
                "version": 3,
            }

    x = put(fill(100, "float32", world.rank))
    total = np.sum([fill(100, "float32", rank) for rank in range(world.size)], axis=0)
    same(collective.allreduce(Foreign(x), Sum), total)
    collective.allreduce_(Foreign(x), Sum)
    same(x, total)


@needs_others  # one rank reduces nothing
@pytest.mark.skipif(IS_REAL, reason="needs the stand-in")
@pytest.mark.parametrize("op", [Sum, Average, Min, Max, collective.Product])
@pytest.mark.parametrize("dtype", [name for name in _core.DType.__members__ if name != "bfloat16"])
def test_values_are_the_hosts(world: World, dtype: str, op: collective.Op, request: pytest.FixtureRequest) -> None:
    """Of every dtype and operator, by the kernels where ranks can use them."""
    if (dtype == "bool" and op is Average) or ("complex" in dtype and op in (Min, Max)):
        pytest.skip("not defined")
    values = fill(70_001, dtype, world.rank)
    factors = {"prescale_factor": 0.75, "postscale_factor": 3.0} if dtype != "bool" else {}
    before = stand_in.standInLaunches()
    got = collective.allreduce(put(values), op, **factors)
    wanted = collective.allreduce(values, op, **factors)
    in_memory = "memory" in request.node.name
    # In messages sums are rounded on the way from rank to rank, and in another order where they are short.
    tolerance = {"rtol": 0.0 if in_memory or dtype != "float16" else 5e-3}
    if NCCL and in_memory:  # an average's factor is applied before the sum
        tolerance |= {"atol": {"float16": 0.05, "float32": 1e-5, "float64": 1e-13}.get(dtype, 0.0)}
    np.testing.assert_allclose(got.get(), wanted, **tolerance)
    kernels = SHARES if in_memory else SENDS
    assert (stand_in.standInLaunches() > before) == (kernels and values.nbytes >= 1 << 16)
    root = world.size - 1
    total, wanted = collective.reduce(put(values), root, op), collective.reduce(values, root, op)
    if world.rank == root:
        np.testing.assert_allclose(total.get(), wanted, **tolerance)


def test_what_is_not_contiguous(world: World) -> None:
    values = fill((6, 7), "float32", world.rank)
    total = np.sum([fill((6, 7), "float32", rank) for rank in range(world.size)], axis=0)
    x = put(values).T
    same(collective.allreduce(x, Sum), total.T)
    with pytest.raises(collective.InvalidArgumentError, match="contiguous"):
        collective.allreduce_(x, Sum)


def test_join(world: World) -> None:
    for step in range(world.rank + 1):
        there = [rank for rank in range(world.size) if rank + 1 > step]
        for n in (100, 3_000_000):
            x = put(fill(n, "float32", world.rank, step))
            same(collective.allreduce(x, Sum), np.sum([fill(n, "float32", rank, step) for rank in there], axis=0))
        most = collective.allreduce(x, Max, name="most")
        same(most, np.max([fill(n, "float32", rank, step) for rank in there], axis=0))
        same(collective.broadcast(x, world.size - 1), fill(n, "float32", world.size - 1, step))
        rows = put(fill((3, 2), "int32", world.rank, step))
        same(collective.allgather(rows), np.concatenate([fill((3, 2), "int32", rank, step) for rank in there]))
    collective.join()


@pytest.mark.parametrize("way", ["host", "cuda"])
@pytest.mark.parametrize("wire", ["float32", "float16"])
def test_buckets(world: World, wire: str, way: str, request: pytest.FixtureRequest) -> None:
    """What an optimizer does with gradients on a device."""
    counts = [1000, 0, 70_001, 5]
    engine = runtime.current().engine
    name = f"bucket of {wire} on a device by way of the {way}"
    bucket = opened_bucket(engine, name, counts, "cpu" if way == "host" else "cuda", wire=wire)
    in_memory = "memory" in request.node.name and world.size > 1
    if not IS_REAL:
        assert bucket.on_device == (way == "cuda" and world.size > 1 and (SHARES if in_memory else SENDS))
        assert stand_in.standInPageLocks() == int(in_memory and not bucket.on_device)
    # What is compressed is cast before it leaves its device.
    dtype = bucket.dtype.name
    assert dtype == ("float32" if bucket.on_device else wire)
    for step in range(5):
        stream = cupy.cuda.Stream()
        with stream:
            tensors = [put(fill(n, dtype, world.rank, step + i)) for i, n in enumerate(counts)]
            given = [x.data.ptr for x in tensors]
            if world.rank > 0:
                given[2] = 0
            run = bucket.start(given, [0] if world.rank == world.size - 1 else [], 0, stream.ptr)
            finished(engine, run)
            assert bucket.noted(0)
            assert not bucket.noted(1)
            results = [put(np.full(n, 7, dtype)) for n in counts]
            bucket.fetch([x.data.ptr for x in results], 0, stream.ptr)
            for i, n in enumerate(counts):
                ranks = [0] if i == 2 else range(world.size)
                same(results[i], np.sum([fill(n, dtype, rank, step + i) for rank in ranks], axis=0))
    del bucket
    deadline = time.monotonic() + 20
    while not IS_REAL and stand_in.standInPageLocks() > 0:  # until the engine looks whether results have been fetched
        assert time.monotonic() < deadline
        time.sleep(0.05)


def device_bytes(pointer: int, nbytes: int, owner: object, device: object) -> torch.Tensor:
    """As arrays.device_bytes(), of memory that the host can touch."""
    memory = (ctypes.c_uint8 * nbytes).from_address(pointer)
    memory.owner = owner
    return torch.frombuffer(memory, dtype=torch.uint8)


@pytest.mark.skipif(IS_REAL, reason="needs the stand-in")
def test_a_join_that_waits_for_ever(world: World, impatient: None, capfd: pytest.CaptureFixture[str]) -> None:
    same(collective.allreduce(put(np.ones(3)), Sum), np.full(3, float(world.size)))
    stream = cupy.cuda.Stream()
    stand_in.standInHold(ctypes.c_void_p(stream.ptr))
    with stream, pytest.raises(collective.CollectiveTimeoutError, match=r"join: waits for .* queued on a device"):
        collective.join()
    assert "stalled: join: waits for" in capfd.readouterr().err
    stand_in.standInRelease()
    same(collective.allreduce(put(np.ones(3)), Sum), np.full(3, float(world.size)))


@pytest.mark.parametrize("way", ["host", "cuda"])
def test_a_compressed_bucket_when_a_rank_has_joined(world: World, way: str) -> None:
    """All ranks count with the same arithmetic: also one that has nothing of its own, not even the tensors' type."""
    engine, op = runtime.current().engine, _core.ReduceOp.Average
    kind = "cpu" if way == "host" else "cuda"
    bucket = opened_bucket(engine, f"averages by way of the {way}", [4096], kind, wire="float16", op=op)
    stream = cupy.cuda.Stream()
    with stream:
        for ranks in (world.size, 1):
            if world.rank < ranks:
                given = [put(np.full(4096, 8.0 * world.size, bucket.dtype.name))]  # so that averages are exact
                finished(engine, bucket.start([given[0].data.ptr], [], 0, stream.ptr))
                bucket.fetch([given[0].data.ptr], 0, stream.ptr)
                same(given[0], np.full(4096, 8.0 * ranks, bucket.dtype.name))
        collective.join()


def opened_bucket(
    engine: Any,
    name: str,
    counts: list[int],
    kind: str,
    number: int = 0,
    wire: str = "float32",
    op: _core.ReduceOp = _core.ReduceOp.Sum,
) -> _core.Bucket:
    """Of float32 on the device of this number, with two notes."""
    dtype, to, group = _core.DType.float32, getattr(_core.DType, wire), process_sets.global_process_set.group
    layouts = [_core.BucketLayout(dtype, to, counts, 2, number)]
    devices.prepare(number)
    opening = _core.open_buckets(engine, group, name, layouts, dtype, to, op, 1.0, 1.0, name, kind, number, 0)
    finished(engine, opening.ticket)
    return opening.buckets()[0]


def finished(engine: Any, ticket: Any) -> Any:
    while not engine.wait(ticket, 0.1):
        pass
    assert ticket.code == 0, ticket.text
    return ticket


def test_buckets_and_names_in_an_order_of_each_rank(world: World) -> None:
    """Buckets start when their rank likes, between operations that have to be agreed on."""
    engine = runtime.current().engine
    devices.prepare(0)
    counts = [70_001, 3]
    buckets = [opened_bucket(engine, f"bucket {number} of many", counts, "cuda") for number in range(12)]
    order = list(range(15))
    random = np.random.default_rng(world.rank)
    for step in range(6):
        random.shuffle(order)
        stream = cupy.cuda.Stream()
        under_way = {}
        with stream:
            for number in order:
                given = [put(fill(n, "float32", world.rank, 10 * step + number)) for n in counts]
                if number < len(buckets):
                    under_way[number] = buckets[number].start([x.data.ptr for x in given], [], 0, stream.ptr), given
                else:
                    handle = collective.allreduce_async(given[0], (Sum, Max)[number % 2], name=f"name {number} of many")
                    under_way[number] = handle, given
            random.shuffle(order)
            for number in order:
                run, given = under_way[number]
                each = [fill(counts[0], "float32", rank, 10 * step + number) for rank in range(world.size)]
                if number < len(buckets):
                    finished(engine, run)
                    buckets[number].fetch([x.data.ptr for x in given], 0, stream.ptr)
                    same(given[0], np.sum(each, axis=0))
                else:
                    same(run.wait(), (np.max if number % 2 else np.sum)(each, axis=0))


@pytest.fixture
def nccl_calls(world: World, transport: None, request: pytest.FixtureRequest) -> Callable[[], int]:  # noqa: F811
    """How many all-reduces this rank has called so far in NCCL, in a runtime that is new; real ones are not counted."""
    if not NCCL or world.size == 1 or "memory" not in request.node.name:
        pytest.skip("without NCCL")
    collective.shutdown()
    collective.init()
    devices.prepare(0)  # loads it
    return (lambda: 0) if IS_REAL else ctypes.CDLL("libnccl.so.2").standInNcclCalls


def test_nccl_makes_the_sums(world: World, nccl_calls: Callable[[], int]) -> None:
    """Not of what it does not know, nor of what is short, nor of other sets of ranks."""
    x = put(np.ones(1 << 16, "float32"))
    collective.allreduce(x, Sum)
    assert ", sums by NCCL 2." in runtime.current().engine.device_way()
    for array, op, calls, factor in (
        (x, Sum, 1, 1.0),
        (x, Average, 1, 0.5),
        (x, Max, 0, 1.0),
        (put(np.ones(100, "float32")), Sum, 0, 1.0),
        (put(np.ones(1 << 16, "int64")), Sum, 1, 1.0),
        (put(np.ones(1 << 16, "int64")), Average, 0, 1.0),
        (put(np.ones(1 << 16, "int16")), Sum, 0, 1.0),
        (put(np.ones(1 << 16, "float16")), Average, 1, 1.0),
        (put(np.full(1 << 16, 60000, "float16")), Average, 0, 0.5),
        (put(np.ones(5 << 20, "float32")), Sum, 2, 1.0),
    ):
        before = nccl_calls()
        result = collective.allreduce(array, op, postscale_factor=factor)
        count = world.size if op is Sum else 1
        same(result, (array.get() * count * factor).astype(array.dtype))
        assert nccl_calls() - before == (0 if IS_REAL else calls)
    if world.size > 2:
        before = nccl_calls()
        pair = collective.add_process_set([0, 1])
        if world.rank < 2:
            same(collective.allreduce(x, Sum, process_set=pair), np.full(1 << 16, 2, "float32"))
        collective.remove_process_set(pair)
        assert nccl_calls() == before


def test_nccl_beside_kernels(world: World, nccl_calls: Callable[[], int]) -> None:
    """They are on different streams, and what comes later may be over sooner."""
    slow = [fill(1_000_000, "float32", rank) for rank in range(world.size)]
    for step in range(10):
        quick = [fill(20_000, "float32", rank, step) for rank in range(world.size)]
        first = collective.allreduce_async(put(slow[world.rank]), Max, name="by kernels")
        second = collective.allreduce_async(put(quick[world.rank]), Sum, name="by NCCL")
        third = collective.allreduce_async(put(slow[world.rank]), Min, name="by kernels again")
        same(second.wait(), np.sum(quick, axis=0))
        same(first.wait(), np.max(slow, axis=0))
        same(third.wait(), np.min(slow, axis=0))


def test_nccl_sums_in_buckets(world: World, nccl_calls: Callable[[], int]) -> None:
    """It is called when all ranks have packed; for buckets on the same devices as it is."""
    engine = runtime.current().engine
    stream = cupy.cuda.Stream()
    with stream:
        for device in range(DEVICES):
            devices.prepare(device)
            bucket = opened_bucket(engine, f"bucket on {device}", [1000, 5], "cuda", device)
            with cupy.cuda.Device(device):
                queue = cupy.cuda.Stream()
                with queue:
                    given = [put(fill(n, "float32", world.rank), device) for n in (1000, 5)]
                    before = nccl_calls()
                    if world.rank == world.size - 1:
                        time.sleep(0.3)
                    run = bucket.start([x.data.ptr for x in given], [], device, queue.ptr)
                    if world.rank < world.size - 1:
                        time.sleep(0.1)
                        assert nccl_calls() == before
                    finished(engine, run)
                    bucket.fetch([x.data.ptr for x in given], device, queue.ptr)
                    for x, n in zip(given, (1000, 5), strict=True):
                        same(x, np.sum([fill(n, "float32", rank) for rank in range(world.size)], axis=0))
                    assert nccl_calls() - before == (0 if IS_REAL else int(device == 0))


@needs_others
@pytest.mark.skipif(IS_REAL, reason="needs the stand-in")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_results_that_are_still_fetched_when_a_rank_joins(world: World, device: str) -> None:
    """The others run the bucket again, also in the name of the one that has joined."""
    engine = runtime.current().engine
    devices.prepare(0)
    bucket = opened_bucket(engine, f"fetched late from the {device}", [1000, 5], device)
    stream = cupy.cuda.Stream()
    with stream:
        given = [put(np.full(n, 1.0, "float32")) for n in (1000, 5)]
        finished(engine, bucket.start([x.data.ptr for x in given], [], 0, stream.ptr))
        results = [put(np.zeros(n, "float32")) for n in (1000, 5)]
        if world.rank == 0:
            stand_in.standInHold(ctypes.c_void_p(stream.ptr))
            threading.Timer(0.5, stand_in.standInRelease).start()
        bucket.fetch([x.data.ptr for x in results], 0, stream.ptr)
        if world.rank > 0:
            again = [put(np.full(n, 100.0, "float32")) for n in (1000, 5)]
            finished(engine, bucket.start([x.data.ptr for x in again], [], 0, stream.ptr))
        collective.join()
        for x, n in zip(results, (1000, 5), strict=True):
            same(x, np.full(n, world.size, "float32"))


@pytest.mark.parametrize("as_view", [None, True, False])
@pytest.mark.parametrize("compression", [hvd.Compression.none, hvd.Compression.fp16])
def test_an_optimizer(world: World, monkeypatch: pytest.MonkeyPatch, compression: type, as_view: bool | None) -> None:
    """On stand-ins, gradients of the host are taken for a device's, since there are no others. What torch does on a
    device it would do on its stream, behind the results; here it must wait for them."""
    if IS_REAL and not torch.cuda.is_available():
        pytest.skip("torch has no CUDA")
    if not IS_REAL:
        if as_view is not False and not SENDS:
            pytest.skip("the host cannot touch what lies in a bucket")
        stand_in.standInTakeHost(1)
        monkeypatch.setattr(arrays, "device_bytes", device_bytes)
        monkeypatch.setattr(arrays, "place_of_tensor", lambda x: (0, cupy.cuda.get_current_stream().ptr))
        fetch = _core.Bucket.fetch

        def fetch_and_wait(bucket: _core.Bucket, *arguments: Any) -> None:
            fetch(bucket, *arguments)
            cupy.cuda.get_current_stream().synchronize()

        monkeypatch.setattr(_core.Bucket, "fetch", fetch_and_wait)
    device = torch.device("cuda:0" if IS_REAL else "cpu")
    try:
        model = torch.nn.Sequential(*(torch.nn.Linear(9, 9) for _ in range(6)))
        model.to(device)
        for p in model.parameters():
            torch.nn.init.ones_(p)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0),
            model.named_parameters(),
            compression=compression,
            groups=4,
            gradient_as_bucket_view=as_view,
        )
        own = torch.nn.Sequential(*(torch.nn.Linear(9, 9) for _ in range(6))).to(device)
        own.load_state_dict(model.state_dict())
        for step in range(6):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            own.zero_grad()
            (model(torch.full((1, 9), (world.rank + step) / 1024, device=device)).sum() / 4096).backward()
            for rank in range(world.size):
                (own(torch.full((1, 9), (rank + step) / 1024, device=device)).sum() / 4096 / world.size).backward()
            if step == 4:
                torch.nn.utils.clip_grad_value_(model.parameters(), 0.0)  # after buckets have started
                own.zero_grad(set_to_none=False)
            optimizer.step()
            for p, q in zip(model.parameters(), own.parameters(), strict=True):
                tolerance = 1e-5 if compression is hvd.Compression.none else 2e-3
                torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=1e-6)
    finally:
        if not IS_REAL:
            stand_in.standInTakeHost(0)
