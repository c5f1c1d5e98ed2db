"""Parameters and gradients of every dtype, memory layout and kind."""

import contextlib
import itertools
from functools import partial
from typing import Any

import pytest
import torch

import collective
import collective.torch as hvd
from harness.plugin import World
from training import ALL, EACH_ITS_OWN, WAYS, Twins, parameter, settings, sgd, values


class Odd(torch.nn.Module):
    """Parameters in every memory layout: channels last, transposed, with gaps, without elements, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 2, dtype=torch.float64)
        self.conv.weight = parameter(4, 3, 2, 2)
        self.conv.bias = parameter(4)
        self.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.volume = torch.nn.Parameter(parameter(2, 3, 2, 2, 2).data.to(memory_format=torch.channels_last_3d))
        self.transposed = torch.nn.Parameter(parameter(4, 6).data.t())
        self.gaps = torch.nn.Parameter(parameter(5, 8).data[:, ::2])
        self.offset = torch.nn.Parameter(parameter(9).data[2:7])
        self.scalar = parameter()
        self.empty = parameter(0, 3)  # the last one, so the first to get a bucket

    def loss(self, rank: int, step: int) -> torch.Tensor:
        images = self.conv(values((2, 3, 4, 4), rank, step).to(memory_format=torch.channels_last))
        others = [self.volume, self.transposed, self.gaps, self.offset, self.empty, self.scalar]
        products = [(p * values(p.shape, rank, step + salt)).sum() for salt, p in enumerate(others)]
        return torch.tanh(images).mean() + torch.tanh(torch.stack(products)).sum()


@pytest.mark.ranks(1, 2, 3)
def test_layouts_of_parameters_and_gradients(world: World) -> None:
    for threshold, shared_memory in WAYS:
        with settings(threshold, shared_memory=shared_memory):
            twins = Twins(world, Odd())
            layouts = [p.stride() for p in twins.model.parameters()]
            for step in range(6):
                twins.zero_grad(set_to_none=step % 2 == 0)
                twins.backward(lambda model, rank, step=step: model.loss(rank, step))
                if step == 3:  # a layout other than the parameter's
                    for p in (twins.model.transposed, twins.model.conv.weight):
                        p.grad = p.grad.contiguous()
                twins.step()
                twins.check()
            assert [p.stride() for p in twins.model.parameters()] == layouts


@pytest.mark.ranks(2)
def test_gradients_given_by_hand(world: World) -> None:
    """Also of stride 0, and also on some ranks only."""
    with settings(EACH_ITS_OWN):
        p, q = parameter(3, 2), parameter(2)
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p, q], lr=1), op=hvd.Sum)
        before = p.detach().clone()
        p.grad = torch.tensor(1.0 + world.rank, dtype=torch.float64).expand(3, 2)
        if world.rank == 1:
            q.grad = torch.ones(2, dtype=torch.float64)
        optimizer.step()
        assert torch.equal(p, before - 3)
        assert torch.equal(q, parameter(2) - 1)


@pytest.mark.ranks(1, 2, 3)
def test_all_dtypes_in_one_model(world: World) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
    for threshold, shared_memory in WAYS:
        with settings(threshold, shared_memory=shared_memory), torch.no_grad():
            parameters = [parameter(3, 2, salt=salt, dtype=dtype) for salt, dtype in enumerate(dtypes * 2)]
            optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1), op=hvd.Sum)
            expected = [p - sum(values((3, 2), r, 5, p.dtype) for r in range(world.size)) for p in parameters]
            with torch.enable_grad():
                for p in parameters:
                    p.backward(values((3, 2), world.rank, 5, p.dtype))  # type: ignore[no-untyped-call]
            optimizer.step()
            for p, value in zip(parameters, expected, strict=True):
                assert torch.equal(p, value), (p.dtype, threshold)


@pytest.mark.ranks(2, 3)
def test_complex_gradients_that_are_lazy_conjugates(world: World) -> None:
    """Torch may leave conjugation to the reader of a gradient, on one rank and not on the other."""
    with settings(ALL):
        twins = Twins(world, torch.nn.ParameterList([parameter(4, dtype=torch.complex128)]))
        for step in range(6):

            def loss(model: Any, rank: int, step: int = step) -> Any:
                kind = (rank + step) % 3  # none, plain, conjugate
                w, x = model[0], values(4, rank, step, torch.complex128)
                return ((w if kind == 1 else w.conj()) * x).sum().real if kind else None

            twins.train([loss])
            twins.check()


@pytest.mark.ranks(2)
def test_gradients_of_another_dtype_than_the_parameter(world: World) -> None:
    """Torch allows a float32 gradient for a bfloat16 parameter: reduced as such, or refused, but never misread."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    p = parameter(3, dtype=torch.bfloat16)
    p.grad_dtype = torch.float32
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=1), op=hvd.Sum)
    p.grad = values(3, world.rank, dtype=torch.float32)
    with contextlib.suppress(collective.UnsupportedTypeError):
        optimizer.synchronize()
        assert torch.equal(p.grad, sum(values(3, rank, dtype=torch.float32) for rank in range(2)))


@pytest.mark.ranks(2, 3)
@pytest.mark.limit(30)
def test_a_refused_gradient_is_an_error_on_every_rank(world: World) -> None:
    """Also when only one rank has it, and other buckets have started; the next step is as good as ever."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    with settings(EACH_ITS_OWN, timeout=10):
        parameters = [parameter(3000, dtype=dtype) for dtype in (torch.float64,) * 3 + (torch.bfloat16,)]
        parameters[1].grad_dtype = None  # may be any
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1), op=hvd.Sum)

        def step(dtype: torch.dtype) -> None:
            optimizer.zero_grad()
            for p in parameters[world.rank % 2 :]:
                p.backward(values(p.shape, world.rank, dtype=p.dtype))  # type: ignore[no-untyped-call]
            parameters[1].grad = values(3000, world.rank, dtype=dtype)
            optimizer.step()

        step(torch.float64)
        for culprits in ((0, 1, 2), (1,), (0,)) * 4:
            if world.rank in culprits:
                with pytest.raises(collective.UnsupportedTypeError, match=r"parameter\.1.*float32"):
                    step(torch.float32)
            else:
                with pytest.raises(collective.CollectiveError):
                    step(torch.float64)
        step(torch.float64)
        expected = sum(values(3000, rank) for rank in range(world.size))
        assert torch.equal(parameters[1].grad, expected)
        assert torch.equal(parameters[2].grad, expected)


class Words(torch.nn.Module):
    """A table whose gradient is sparse where words are looked up in it, and dense where it is a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(7, 2, sparse=True, _weight=parameter(7, 2).data)
        self.scale = parameter(2)

    def loss(self, rank: int, step: int) -> torch.Tensor:
        words = torch.tensor([rank, step, rank + step])
        result: torch.Tensor = (self.table(words) * self.scale - 1).square().sum()
        return result

    def dense_loss(self) -> torch.Tensor:
        return (self.table.weight * self.scale).square().sum()


@pytest.mark.ranks(1, 2, 3)
def test_sparse_gradients(world: World) -> None:
    """Gathered, or reduced as dense ones; also where some ranks have none."""
    plain = partial(torch.optim.SGD, lr=0.125)
    for threshold in (EACH_ITS_OWN, ALL):
        for make, options in ((plain, {}), (sgd, {"gradient_predivide_factor": 2.0}), (torch.optim.Adam, {})):
            as_dense = make is torch.optim.Adam  # which takes no sparse gradients
            with settings(threshold):
                twins = Twins(world, Words(), make, sparse_as_dense=as_dense, **options)
                twins.twin.table.sparse = not as_dense
                for step in range(4):
                    twins.train([lambda m, rank, s=step: m.loss(rank, s) if s < 2 or rank == s - 2 else None])
                    twins.check()


@pytest.mark.ranks(2, 3)
def test_sparse_on_one_rank_and_dense_on_another(world: World) -> None:
    for threshold, as_dense in itertools.product((EACH_ITS_OWN, ALL), (True, False)):
        with settings(threshold):
            twins = Twins(world, Words(), partial(torch.optim.SGD, lr=0.125), sparse_as_dense=as_dense)
            for step in range(4):
                twins.train([lambda m, rank, s=step: m.dense_loss() if rank == s % 2 else m.loss(rank, s)])
                twins.check()
