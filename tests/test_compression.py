"""Gradients that travel in 16 bits: how exact the results are."""

from typing import Any

import pytest
import torch

import collective.torch as hvd
from collective import CollectiveError
from harness.plugin import World
from training import ALL, EACH_ITS_OWN, WAYS, Layers, Twins, assert_same_on_all_ranks, parameter, settings, sgd, values

# Compression, the relative error of one rounding, the absolute one of what is smaller than normal numbers.
FORMATS: list[tuple[Any, float, float]] = [
    (hvd.Compression.fp16, 2.0**-11, 2.0**-25),
    (hvd.Compression.bf16, 2.0**-8, 2.0**-134),
]
SIZES = (0, 1, 2, 3, 7, 1000, 4096, 4097, 40_001)  # recursive doubling and the ring


def numbers(count: int, rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of every magnitude between 2**-20 and 2**8, of either sign."""
    generator = torch.Generator().manual_seed(count * 100 + rank)
    real = torch.randn(count, generator=generator, dtype=torch.float64)
    return (real * 2.0 ** torch.randint(-20, 6, (count,), generator=generator)).to(dtype)


@pytest.mark.ranks(1, 2, 3, 4)
def test_error_of_a_reduction(world: World) -> None:
    """At most one rounding of each contribution, of each partial sum and of the result."""
    for compression, unit, tiny in FORMATS:
        for dtype in (torch.float32, torch.float64):
            for count in SIZES:
                every = torch.stack([numbers(count, rank, dtype).double() for rank in range(world.size)])
                roundings = 0 if world.size == 1 else world.size + 1
                bound = roundings * (unit * every.abs().sum(0) + tiny * world.size) * 1.01 + 1e-30
                for op in (hvd.Average, hvd.Sum):
                    result = hvd.allreduce(numbers(count, world.rank, dtype), compression=compression, op=op)
                    scale = world.size if op == hvd.Average else 1
                    if world.size == 1:  # nothing travels, but what comes out may be rounded
                        bound = unit * every[0].abs() + tiny
                    error = (result.double() * scale - every.sum(0)).abs()
                    assert result.dtype == dtype
                    assert bool((error <= bound).all()), (compression.wire, dtype, count, op)
                    assert_same_on_all_ranks(world, [result])


@pytest.mark.ranks(2, 3)
def test_exact_where_the_format_is_and_untouched_where_it_does_not_apply(world: World) -> None:
    integers = [values(1001, rank, dtype=torch.float32) for rank in range(world.size)]  # eighths
    fine = [torch.full((5,), 2**20 + 1 + rank) for rank in range(world.size)]  # need 21 bits
    for compression, *_ in FORMATS:
        assert torch.equal(hvd.allreduce(integers[world.rank], op=hvd.Sum, compression=compression), sum(integers))
        for dtype in (torch.int32, torch.int64, torch.complex64, torch.complex128):
            mine = fine[world.rank].to(dtype)
            expected = sum(one.to(dtype) for one in fine)
            assert torch.equal(hvd.allreduce(mine, op=hvd.Sum, compression=compression), expected)
        for dtype in (torch.float16, torch.bfloat16):
            mine = values(33, world.rank, dtype=dtype)
            plain = hvd.allreduce(mine)
            assert torch.equal(hvd.allreduce(mine, compression=compression), plain)


@pytest.mark.ranks(2, 3)
def test_large_and_infinite_numbers(world: World) -> None:
    for count in (3, 20_000):
        large = torch.full((count,), 6e4)
        fp16, bf16 = (hvd.Compression.fp16, hvd.Compression.bf16)
        # An average of what fp16 can hold does not overflow on the way.
        torch.testing.assert_close(hvd.allreduce(large, compression=fp16), large, rtol=2.0**-9, atol=0)
        assert hvd.allreduce(large, op=hvd.Sum, compression=fp16).isinf().all()
        torch.testing.assert_close(hvd.allreduce(large * 1e30, compression=bf16), large * 1e30, rtol=2.0**-6, atol=0)
        for compression in (fp16, bf16):
            mine = torch.zeros(count)
            mine[0] = float("inf") if world.rank == 1 else 1.0
            mine[1] = float("nan") if world.rank == 0 else 1.0
            mine[2] = float("-inf") if world.rank == 1 else float("inf")
            result = hvd.allreduce(mine, compression=compression)
            assert result[0] == float("inf")
            assert result[1:3].isnan().all()
            assert result[3:].eq(0).all()
            assert_same_on_all_ranks(world, [result])


@pytest.mark.ranks(2, 3)
def test_gradient_travels_like_the_value(world: World) -> None:
    for compression, unit, _ in FORMATS:
        x = values(5, world.rank, dtype=torch.float32).requires_grad_()
        (hvd.allreduce(x, compression=compression) * (1 + 1e-4 * world.rank)).sum().backward()
        expected = sum(1 + 1e-4 * rank for rank in range(world.size)) / world.size
        torch.testing.assert_close(x.grad, torch.full((5,), expected), rtol=4 * unit, atol=0)
        assert_same_on_all_ranks(world, [x.grad])


@pytest.mark.ranks(1, 2, 3)
def test_training(world: World) -> None:
    """Each step's gradients are within the bound; replicas stay equal; the loss falls as without compression."""
    for compression, unit, _ in FORMATS:
        for threshold, shared_memory in WAYS:
            with settings(threshold, shared_memory=shared_memory):
                twins = Twins(world, Layers(dtype=torch.float32), compression=compression)
                for step in range(15):
                    twins.zero_grad()
                    twins.backward(lambda model, rank, step=step: model.loss(rank, step % 3))
                    sizes = [p.grad.abs().max() for p in twins.twin.parameters()]
                    twins.optimizer.synchronize()
                    for p, exact, size in zip(twins.model.parameters(), twins.twin.parameters(), sizes, strict=True):
                        # The local gradients may be larger than their mean.
                        torch.testing.assert_close(p.grad, exact.grad, rtol=0, atol=float(20 * unit * size) + 1e-6)
                    twins.step()
                    twins.twin.load_state_dict(twins.model.state_dict())  # so that errors do not add up
                    assert_same_on_all_ranks(world, twins.model.parameters())


@pytest.mark.ranks(2, 3)
def test_mixed_model(world: World) -> None:
    """What a format does not apply to travels as it is, in the same optimizer."""
    with settings(ALL):
        parameters = [
            parameter(3, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float16, torch.complex64)
        ]
        optimizer = hvd.DistributedOptimizer(sgd(parameters), compression=hvd.Compression.bf16, op=hvd.Sum)
        for p in parameters:
            p.grad = values(3, world.rank, dtype=p.dtype)
        optimizer.synchronize()
        for p in parameters:
            assert torch.equal(p.grad, sum(values(3, rank, dtype=p.dtype) for rank in range(world.size)))


@pytest.mark.ranks(1, 2, 3)
def test_predivide_factor(world: World) -> None:
    with settings(EACH_ITS_OWN):
        for factor in (2.0, 0.25, float(world.size), 1e4):
            twins = Twins(world, Layers(), gradient_predivide_factor=factor)
            twins.train(lambda model, rank, step=step: model.loss(rank, step) for step in range(3))
            twins.check()


class Scaled(hvd.Compressor):
    """Halves travel, as float64; the context says how large they were."""

    calls = 0

    @classmethod
    def compress(cls, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        cls.calls += 1
        return tensor.double().reshape(-1) / 2, (tensor.shape, tensor.dtype)

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        shape, dtype = ctx
        return (tensor * 2).reshape(shape).to(dtype)


class Doubling:
    """Horovod asks for no base class."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return tensor, None

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return tensor * 2


@pytest.mark.ranks(1, 2, 3)
def test_a_compressor_of_the_users_own(world: World) -> None:
    total = sum(numbers(4, rank) for rank in range(world.size))
    x = numbers(4, world.rank).requires_grad_()
    y = hvd.allreduce(x, op=hvd.Sum, compression=Doubling)  # type: ignore[arg-type]
    torch.testing.assert_close(y, total * 2)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((4,), 2.0 * world.size))
    torch.testing.assert_close(hvd.grouped_allreduce([x, x], op=hvd.Sum, compression=Scaled)[1], total)  # type: ignore[arg-type]
    for fp16, dtype in ((hvd.Compression.fp16, torch.float16), (hvd.Compression.bf16, torch.bfloat16)):
        small, ctx = fp16.compress(x.detach())
        assert small.dtype == dtype
        assert fp16.decompress(small, ctx).dtype == torch.float32
        assert fp16.compress(torch.ones(2, dtype=torch.int32))[0].dtype == torch.int32
    small, ctx = hvd.Compression.none.compress(x)
    assert hvd.Compression.none.decompress(small, ctx) is x


@pytest.mark.ranks(1, 2, 3)
def test_training_with_a_compressor_of_the_users_own(world: World) -> None:
    """With gradients on some ranks or none, several passes, changes before the step, and frozen parameters."""
    model = Layers()
    Scaled.calls = 0
    twins = Twins(world, model, compression=Scaled, backward_passes_per_step=2)
    for step in range(6):
        twins.zero_grad(set_to_none=step % 2 == 0)
        for net in (twins.model, twins.twin):
            net[1].requires_grad_(step != 4)
        for number in range(2):
            which = [2] if step == 1 else None

            def loss(m: Any, rank: int, s: int = step, n: int = number, w: Any = which) -> Any:
                return None if s == 2 and rank == 0 else m.loss(rank, 10 * s + n, w)

            twins.backward(loss)
        if step == 3:
            for net in (twins.model, twins.twin):
                for p in net.parameters():
                    p.grad.mul_(0.5)
        if step == 5:
            twins.optimizer.synchronize()
            for net in (twins.model, twins.twin):
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        twins.step()
        twins.check()
    assert (Scaled.calls > 0) == (world.size > 1)
    twins = Twins(world, Layers(), compression=Doubling, op=hvd.Sum, process_set=hvd.global_process_set)
    twins.train([lambda m, rank: m.loss(rank)])
    if world.size > 1:
        for p, q in zip(twins.model.parameters(), twins.twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad * world.size * 2, rtol=1e-12, atol=1e-12)


@pytest.mark.ranks(2)
def test_gradients_dropped_or_replaced_after_they_were_sent(world: World) -> None:
    """On one rank or both, with a compressor of the user's own."""
    p, q = parameter(3), parameter(2)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p, q], lr=1.0, weight_decay=0.5), compression=Doubling)
    for ranks in ((0,), (0, 1)):
        before = p.detach().clone()
        if world.rank in ranks:
            (p.sum() + q.sum()).backward()
            p.grad = None
        optimizer.step()
        assert p.grad is None
        assert torch.equal(p, before)
        optimizer.zero_grad()
    p.sum().backward()
    assert p.grad is not None
    p.grad.data = torch.full_like(p, 7.0)
    optimizer.synchronize()
    torch.testing.assert_close(p.grad, torch.full_like(p, 14.0))


class Raises(Doubling):
    """In one of its methods, on one rank, in the second step."""

    method, rank, step = "", 0, 0

    @classmethod
    def compress(cls, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        cls.check("compress")
        return tensor, None

    @classmethod
    def decompress(cls, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        cls.check("decompress")
        return tensor * 2

    @classmethod
    def check(cls, method: str) -> None:
        if cls.step == 1 and method == cls.method and cls.rank == hvd.rank():
            raise ZeroDivisionError("of the compressor's own")


@pytest.mark.ranks(2, 3)
def test_a_compressor_that_raises_on_one_rank(world: World) -> None:
    """All ranks raise, and go on in step."""
    Raises.rank = world.size - 1
    for Raises.method in ("compress", "decompress"):
        for op in (hvd.Average, hvd.Adasum):
            p, q = parameter(3), parameter(2)
            optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p, q], lr=0.0), op=op, compression=Raises)
            for Raises.step in range(3):
                optimizer.zero_grad()
                (p.sum() + q.sum()).backward()
                alone = (op, Raises.method) == (hvd.Adasum, "decompress") and world.rank != Raises.rank
                if Raises.step != 1 or alone:  # a step of Adasum is made when decompress comes
                    optimizer.step()
                    continue
                mine = world.rank == Raises.rank
                told = "of the compressor's own" if mine else "ZeroDivisionError|another rank has failed"
                with pytest.raises(ZeroDivisionError if mine else CollectiveError, match=told):
                    optimizer.step()
            if op == hvd.Average:
                assert p.grad is not None
                assert torch.equal(p.grad, torch.full_like(p, 2.0))
