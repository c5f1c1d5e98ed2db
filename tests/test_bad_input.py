"""Wrong calls: the right error on every rank concerned, that says who, what and which tensor; then all goes on."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import collective
import collective.torch as hvd
from collective import Average, InvalidArgumentError, Max, Min, Sum, UnsupportedTypeError
from harness.plugin import World

X = np.ones((2, 3), np.float32)
T = torch.ones(2, 3)


def goes_on(world: World, *after: object) -> None:
    """The next correct operations work, unnamed ones and those of a name that has failed."""
    for name in (None, "t"):
        result = collective.allreduce(np.full(3, world.rank + 1), Sum, name=name)
        np.testing.assert_array_equal(result, np.full(3, world.size * (world.size + 1) // 2), f"after {after}")


def call(verb: str, *arguments: Any, **named: Any) -> Callable[[str], Any]:
    """An operation that lacks its name."""
    return lambda name: getattr(collective, verb)(*arguments, name=name, **named)


Wrong = tuple[Callable[[str], Any], type[Exception], list[str]]  # what its message tells beside rank and name


def wrong_arguments(size: int) -> Iterator[Wrong]:
    for op in (7, -1, "Sum", None, 1.5):
        yield call("allreduce", X, op), InvalidArgumentError, ["allreduce", f"op {op!r}", "Average"]
    for compression in ("fp8", 16, "float16"):
        told = ["allreduce", f"compression {compression!r}", "'fp16'", "'bf16'"]
        yield call("allreduce", X, compression=compression), InvalidArgumentError, told
    yield call("allreduce", X > 0, Average), UnsupportedTypeError, ["allreduce", "Average", "bool"]
    yield call("allreduce", X.astype("complex64"), Min), UnsupportedTypeError, ["allreduce", "Min", "complex64"]
    yield call("allreduce", T > 0, Sum, prescale_factor=2), UnsupportedTypeError, ["allreduce", "bool"]
    for factor in ("prescale_factor", "postscale_factor"):
        for number in ("2x", "2", b"2", 10**400):
            yield call("allreduce", X, **{factor: number}), InvalidArgumentError, ["allreduce", factor, repr(number)]
        for number in (float("inf"), float("nan")):
            told = ["reducescatter", factor, str(number), "int32"]
            yield call("reducescatter", X.astype("int32"), **{factor: number}), InvalidArgumentError, told
        yield call("allreduce_", T, **{factor: None}), InvalidArgumentError, ["allreduce", factor, "None"]
    for root in (-1, size, 0.0, "0", True, None):
        yield call("broadcast", X, root), InvalidArgumentError, ["broadcast", f"root_rank {root!r}"]
    for splits in ([0.5] * size, "1" * size, 2):
        yield call("alltoall", X, splits), InvalidArgumentError, ["alltoall", repr(splits)]
    for process_set in (None, [0]):
        yield call("allreduce", X, process_set=process_set), InvalidArgumentError, ["process_set", repr(process_set)]


def wrong_arrays() -> Iterator[Wrong]:
    with FakeTensorMode():
        fake = torch.ones(2)
    arrays = [
        ([1.0, 2.0], "list"),
        (None, "None"),
        ("x", "str"),
        (X.astype("object"), "object"),
        (np.ma.array([1.0, 2.0], mask=[0, 1]), "mask"),
        (T.to_sparse(), "sparse"),
        (torch.nested.nested_tensor([T, T]), "nested"),
        (torch.ones(2, device="meta"), "meta"),
        (fake, "FakeTensor has no memory"),
        (TwoTensor(T, T), "TwoTensor has no memory"),
    ]
    of_types_that_only_move = [
        (X.astype("uint32"), "uint32"),
        (X.astype("longdouble"), str(np.dtype("longdouble"))),
        (np.zeros(2, "M8[s]"), "datetime64"),
        (np.zeros(2, [("a", "f4")]), "'a'"),
        (X.astype(">f4"), ">f4"),
        (torch.ones(2, dtype=torch.uint32), "uint32"),
        (T.to(torch.float8_e4m3fn), "float8"),
    ]
    for verb in ("allreduce", "allreduce_async_", "broadcast", "broadcast_", "allgather", "allgather_async", "scatter"):
        for x, told in arrays:
            yield call(verb, x), UnsupportedTypeError, [verb.split("_")[0], told]
    for verb in ("allreduce", "allreduce_async_", "reducescatter"):
        for x, told in of_types_that_only_move:
            yield call(verb, x), UnsupportedTypeError, [verb.split("_")[0], told]


def wrong_in_place() -> Iterator[Wrong]:
    read_only = np.frombuffer(X.tobytes(), X.dtype)
    apart = [X.T, np.ones(6)[::2], T.t(), torch.ones(1).expand(4), torch.ones(2, dtype=torch.complex64).conj()]
    for verb in ("allreduce_", "allreduce_async_", "broadcast_", "broadcast_async_"):
        told = [verb.split("_")[0], "in place"]
        for x in apart:
            yield call(verb, x), InvalidArgumentError, [*told, "contiguous"]
        yield call(verb, read_only), InvalidArgumentError, [*told, "writeable"]
        yield call(verb, 1.0), UnsupportedTypeError, [*told, "float"]
        yield call(verb, np.float32(1)), UnsupportedTypeError, [*told, "float32"]


def wrong_calls(size: int) -> list[Wrong]:
    return [*wrong_arguments(size), *wrong_arrays(), *wrong_in_place()]


@pytest.mark.ranks(1, 3)
def test_wrong_on_every_rank(world: World) -> None:
    poor = []
    for number, (wrong, error, told) in enumerate(wrong_calls(world.size)):
        what = f"{number}, {told}"
        try:
            wrong("t")
        except Exception as caught:
            missing = [part for part in (f"rank {world.rank}", "'t'", *told) if part not in str(caught)]
            if type(caught) is not error or missing:
                poor.append(f"{what}: {type(caught).__name__} without {missing}: {caught}")
        else:
            poor.append(f"{what}: no error")
        goes_on(world, what)
    assert not poor, "\n".join([f"{len(poor)} messages:", *poor[:20]])


@pytest.mark.ranks(2, 3)
def test_wrong_on_one_rank_alone(world: World) -> None:
    """The others know nothing of it, and wait for it to do better."""
    calls = wrong_calls(world.size)
    for number, (wrong, error, told) in enumerate(calls):
        if world.rank == number % world.size:
            with pytest.raises(error):
                wrong("t")
        if number % 10 == 0:
            goes_on(world, number, told)


@pytest.mark.ranks(2, 3)
def test_an_unnamed_call_that_one_rank_refuses(world: World) -> None:
    """It fails on all ranks, where else it would meet the next call of the others, and all that follow theirs."""
    calls = [wrong for wrong in wrong_calls(world.size) if "process_set" not in wrong[2]]
    for number, (wrong, error, told) in enumerate(calls):
        odd = number % world.size
        verb = told[0]
        right = getattr(collective, verb)

        def both(wrong: Any = wrong, right: Any = right, is_odd: bool = world.rank == odd) -> None:
            result = wrong(None) if is_odd else right(torch.ones(world.size, 1))
            if hasattr(result, "wait"):
                result.wait()

        with pytest.raises(error if world.rank == odd else collective.MismatchError) as caught:
            both()
        if world.rank != odd:
            assert f"rank {odd} rejected its own call" in str(caught.value), str(caught.value)
    for number in range(3):
        assert (collective.allreduce(np.full(2, number), Sum) == number * world.size).all()


@pytest.mark.ranks(2)
def test_a_group_of_which_one_member_is_refused(world: World) -> None:
    xs: list[Any] = [np.ones(2), np.ones(2), np.ones(2)]
    if world.rank == 1:
        xs[1] = [1, 2]
    with pytest.raises(UnsupportedTypeError if world.rank == 1 else collective.MismatchError):
        collective.grouped_allreduce(xs, Sum)
    with pytest.raises(UnsupportedTypeError if world.rank == 1 else collective.MismatchError):
        hvd.sparse_allreduce_async(T if world.rank == 1 else T.to_sparse())()  # type: ignore[arg-type]
    goes_on(world)


@pytest.mark.ranks(1)
def test_wrong_arguments_of_the_torch_interface(world: World) -> None:
    wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: hvd.allreduce(T, average="x"), InvalidArgumentError, "average='x'"),  # type: ignore[arg-type]
        (lambda: hvd.allreduce(T, average=True, op=Sum), InvalidArgumentError, "both given"),
        (lambda: hvd.allreduce(T, name=0.5), InvalidArgumentError, "name 0.5 is a float"),  # type: ignore[arg-type]
        (lambda: hvd.allreduce(T, compression="fp32"), InvalidArgumentError, "'fp32'"),  # type: ignore[arg-type]
        (lambda: hvd.synchronize(None), InvalidArgumentError, "handle"),  # type: ignore[arg-type]
        (lambda: hvd.allgather([1, 2]), UnsupportedTypeError, "list"),  # type: ignore[arg-type]
        (lambda: hvd.broadcast_async_(1.0, 0), UnsupportedTypeError, "float"),  # type: ignore[arg-type]
        (lambda: hvd.alltoall(T, torch.tensor([2.0])), InvalidArgumentError, "splits"),
    ]
    for call, error, told in wrong:
        with pytest.raises(error, match=told):
            call()
    assert hvd.allreduce_async(1.5).wait() == 1.5  # type: ignore[arg-type]
    assert torch.equal(hvd.allreduce(T, name=7), T)  # type: ignore[arg-type]


def mismatches() -> dict[str, tuple[Callable[[str], Any], Callable[[str], Any], str, str]]:
    """By the field that is told: what one rank does, what all others do, and how the message tells both."""
    half, bfloat = np.ones(3, np.float16), torch.ones(3, dtype=torch.bfloat16)
    reduce, send, gather = "allreduce", "broadcast", "allgather"
    return {
        "shape": (call(reduce, np.ones((2, 3))), call(reduce, np.ones((2, 4))), "(2, 3)", "(2, 4)"),
        "shape ": (call(reduce, np.ones(6)), call(reduce, np.ones((2, 3))), "(6,)", "(2, 3)"),
        "shape  ": (call("allreduce_", np.ones(0)), call("allreduce_", np.ones(())), "(0,)", "()"),
        "shape   ": (call("broadcast_", np.ones(3), 1), call("broadcast_", np.ones(4), 1), "(3,)", "(4,)"),
        "shape    ": (call(gather, np.ones((2, 3))), call(gather, np.ones((2, 4))), "(*, 3)", "(*, 4)"),
        "dtype": (call(reduce, X), call(reduce, T.double()), "float32", "float64"),
        "dtype ": (call("allreduce_", half), call("allreduce_", bfloat), "float16", "bfloat16"),
        "dtype  ": (call(gather, X.astype("i4")), call(gather, X.astype("i8")), "int32", "int64"),
        "reduction": (call(reduce, X, Sum), call(reduce, X, Max), "Sum", "Max"),
        "compression": (call(reduce, X, compression="fp16"), call(reduce, X), "float16", "none"),
        "prescale_factor": (call(reduce, X, prescale_factor=0.5), call(reduce, X), "0.5", "1"),
        "postscale_factor": (call(reduce, X), call(reduce, X, postscale_factor=-2), "1", "-2"),
        "root_rank": (call(send, X, 0), call(send, X, 1), "0", "1"),
        "operation": (call(reduce, X), call(send, X), "allreduce", "broadcast"),
        "operation ": (call(gather, X), call("barrier"), "allgather", "barrier"),
    }


@pytest.mark.ranks(2, 3, 4, 7)
def test_one_rank_differs(world: World) -> None:
    """Each rank in turn is the odd one; the message is alike on all."""
    for number, (field, (one, rest, odd, common)) in enumerate(mismatches().items()):
        alone = number % world.size
        others = [rank for rank in range(world.size) if rank != alone]
        for name in (f"mismatch.{number}", "t"):  # a new name, and one that was agreed before
            with pytest.raises(collective.MismatchError) as caught:
                (one if world.rank == alone else rest)(name)
            message = str(caught.value)
            assert len(set(world.comm.allgather(message))) == 1, field
            who = "ranks " if len(others) > 1 else f"rank {others[0]}"
            for part in (f"'{name}'", f"{field.strip()} differs", f"{odd} on rank {alone}", f"{common} on {who}"):
                assert part in message, f"{field}: no {part!r} in: {message}"
            goes_on(world, field)


@pytest.mark.ranks(3, 7)
def test_every_rank_differs(world: World) -> None:
    with pytest.raises(collective.MismatchError) as caught:
        collective.allreduce(np.ones((2, world.rank)), name="t")
    for rank in range(world.size):
        assert f"(2, {rank}) on rank {rank}" in str(caught.value)
    goes_on(world)


@pytest.mark.ranks(3)
def test_a_mismatch_among_many_in_flight(world: World) -> None:
    """It fails alone."""
    bad = {10, 11, 50}
    odd = [world.rank == 1 and n in bad for n in range(80)]
    handles = [collective.allreduce_async(np.ones(5 + odd[n]), Sum, name=f"many.{n}") for n in range(80)]
    for number, handle in enumerate(handles):
        if number in bad:
            for _ in range(2):  # the error is there for every wait
                with pytest.raises(collective.MismatchError, match=rf"'many\.{number}'.*\(6,\) on rank 1"):
                    handle.wait()
            assert handle.poll()
        else:
            np.testing.assert_array_equal(handle.wait(), np.full(5, 3.0))
    goes_on(world)


@pytest.mark.ranks(2, 3, 4)
def test_a_name_twice_in_flight(world: World) -> None:
    poor = []
    for last in range(world.size):  # whose submission the others' first ones wait for
        x = np.full(4, world.rank + 1)
        if world.rank != last:
            handle = collective.allreduce_async(x, Sum, name="t")
            for again in ("allreduce_async", "allgather", "broadcast_"):
                with pytest.raises(collective.DuplicateNameError) as caught:
                    call(again, x)("t")
                told = (f"rank {world.rank}", "'t'", again.split("_")[0])
                poor += [f"no {part!r} in: {caught.value}" for part in told if part not in str(caught.value)]
        world.comm.Barrier()
        if world.rank == last:
            handle = collective.allreduce_async(x, Sum, name="t")
        assert list(handle.wait()) == [world.size * (world.size + 1) // 2] * 4
        goes_on(world)
    assert not poor, "\n".join([f"{len(poor)} messages:", *poor[:3]])


def test_errors_are_what_they_are_to_python() -> None:
    also = {
        collective.InvalidArgumentError: ValueError,
        collective.UnsupportedTypeError: TypeError,
        collective.MismatchError: ValueError,
        collective.DuplicateNameError: ValueError,
        collective.NotInitializedError: ValueError,
        collective.CollectiveTimeoutError: TimeoutError,
        collective.MPIMismatchError: ImportError,
    }
    others = (collective.ForkError, collective.ShutdownError, collective.InternalError)
    for error in (*also, *others):
        assert issubclass(error, collective.CollectiveError)
        assert issubclass(error, RuntimeError)
        assert issubclass(error, also.get(error, RuntimeError))
