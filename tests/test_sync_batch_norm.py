"""SyncBatchNorm equals a single-process BatchNorm over the batches of all ranks, forward and backward."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch

import collective
import collective.torch as hvd
from harness.plugin import World

pytestmark = pytest.mark.ranks(1, 2, 3)

SHAPES = [(), (5,), (4, 3), (2, 3, 2)]
PLAIN = {0: torch.nn.BatchNorm1d, 1: torch.nn.BatchNorm1d, 2: torch.nn.BatchNorm2d, 3: torch.nn.BatchNorm3d}


def batch(rank: int, shape: tuple[int, ...]) -> torch.Tensor:
    """rank + 2 samples of three channels, far from zero mean."""
    generator = torch.Generator().manual_seed(100 * len(shape) + rank)
    return torch.randn(rank + 2, 3, *shape, generator=generator) * 2 + 5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_equals_batch_norm_over_the_whole_batch(
    world: World, shape: tuple[int, ...], affine: bool, momentum: float | None
) -> None:
    ours = hvd.SyncBatchNorm(3, momentum=momentum, affine=affine)
    plain = PLAIN[len(shape)](3, momentum=momentum, affine=affine)
    if affine:
        for module in (ours, plain):
            with torch.no_grad():
                module.weight.copy_(torch.tensor([1.0, 2.0, -0.5]))
                module.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
    for _ in range(2):
        x = batch(world.rank, shape).requires_grad_()
        whole = torch.cat([batch(rank, shape) for rank in range(world.size)]).requires_grad_()
        first = sum(rank + 2 for rank in range(world.rank))
        mine = slice(first, first + world.rank + 2)
        y, y_whole = ours(x), plain(whole)
        torch.testing.assert_close(y, y_whole[mine], rtol=1e-5, atol=1e-5)
        ours.zero_grad()
        plain.zero_grad()
        y.square().sum().backward()
        y_whole.square().sum().backward()
        torch.testing.assert_close(x.grad, whole.grad[mine], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.running_mean, plain.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.running_var, plain.running_var, rtol=1e-5, atol=1e-5)
        if affine:
            for p, q in ((ours.weight, plain.weight), (ours.bias, plain.bias)):
                total = hvd.allreduce(p.grad, op=hvd.Sum)
                torch.testing.assert_close(total, q.grad, rtol=1e-4, atol=1e-3)
    ours.eval()
    plain.eval()
    torch.testing.assert_close(ours(batch(9, shape)), plain(batch(9, shape)), rtol=1e-5, atol=1e-5)


def test_without_running_statistics_and_with_an_empty_rank(world: World) -> None:
    ours = hvd.SyncBatchNorm(3, track_running_stats=False, affine=False)
    x = batch(0, (4,)) if world.rank == 0 else torch.empty(0, 3, 4)
    y = ours(x)
    torch.testing.assert_close(y[:2], torch.nn.BatchNorm1d(3, affine=False)(batch(0, (4,)))[: len(y)])
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        ours(torch.ones(3))


def test_without_anything_on_any_rank(world: World) -> None:
    ours = hvd.SyncBatchNorm(3)
    ours(batch(world.rank, (4,))).sum().backward()
    mean, var = ours.running_mean.clone(), ours.running_var.clone()
    ours.zero_grad()
    x = torch.empty(0, 3, 4, requires_grad=True)
    ours(x).sum().backward()
    for grad in (ours.weight.grad, ours.bias.grad):
        torch.testing.assert_close(grad, torch.zeros(3))
    assert x.grad.shape == x.shape
    torch.testing.assert_close(ours.running_mean, mean)
    torch.testing.assert_close(ours.running_var, var)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_batches_far_from_zero(world: World, dtype: torch.dtype) -> None:
    """A mean of a hundred deviations, which differs between ranks."""
    batches = [batch(rank, (4, 3)).mul(0.5).add(50 + rank).to(dtype) for rank in range(world.size)]
    x = batches[world.rank].clone().requires_grad_()
    whole = torch.cat(batches).double().requires_grad_()
    y, wanted = hvd.SyncBatchNorm(3, affine=False).to(dtype)(x), torch.nn.BatchNorm2d(3, affine=False).double()(whole)
    assert y.dtype == dtype
    mine = slice(sum(rank + 2 for rank in range(world.rank)), None)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y.double(), wanted[mine][: len(y)], rtol=tolerance, atol=tolerance)
    y.pow(3).sum().backward()
    wanted.pow(3).sum().backward()
    assert x.grad.dtype == dtype
    near = 10 * tolerance
    torch.testing.assert_close(x.grad.double(), whole.grad[mine][: len(y)], rtol=near, atol=near)


def test_a_model_is_converted(world: World) -> None:
    inner = torch.nn.Sequential(torch.nn.BatchNorm2d(4, affine=False, track_running_stats=False), torch.nn.ReLU())
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4, momentum=None), inner)
    model.eval()
    before = dict(model.state_dict(keep_vars=True))
    assert hvd.SyncBatchNorm.convert_sync_batchnorm(model) is model
    after = dict(model.state_dict(keep_vars=True))
    assert list(before) == list(after)
    assert all(after[name] is tensor for name, tensor in before.items())
    assert [type(m) for m in (model[1], inner[0])] == [hvd.SyncBatchNorm] * 2
    assert model[1].momentum is None
    assert not model[1].training
    assert repr(model[1]).startswith("SyncBatchNorm(4, eps=1e-05, momentum=None, affine=True")
    x = batch(world.rank, (4, 4))
    model.train()
    assert model(x).shape == (len(x), 4, 4, 4)
    alone = hvd.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm1d(3))
    assert isinstance(alone, hvd.SyncBatchNorm)
    assert hvd.SyncBatchNorm.convert_sync_batchnorm(alone) is alone


def test_conversion_keeps_what_belongs_to_a_module(world: World) -> None:
    """Its hooks, its attributes, and that it is one module under two names."""

    class Named(torch.nn.BatchNorm1d):
        pass

    class Own(torch.nn.BatchNorm1d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return input

    model = torch.nn.Module()
    model.a = model.b = torch.nn.BatchNorm1d(4)
    model.named, model.own = Named(4), Own(4)
    model.a.note = "kept"
    seen: list[str] = []
    model.a.register_forward_hook(lambda *_: seen.append("after"))
    model.a.register_forward_pre_hook(lambda *_: seen.append("before"))
    with pytest.warns(UserWarning, match="Own has a forward"):
        converted: Any = hvd.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted.a is converted.b
    assert [type(m).__name__ for m in converted.children()] == ["SyncBatchNorm", "SyncBatchNorm", "Own"]
    assert converted.a.note == "kept"
    converted.a(torch.ones(2, 4))
    assert seen == ["before", "after"]
    with pytest.raises(collective.InvalidArgumentError, match="LazyBatchNorm1d"):
        hvd.SyncBatchNorm.convert_sync_batchnorm(torch.nn.LazyBatchNorm1d())


def test_models_that_hold_it_can_be_copied(world: World) -> None:
    model = torch.nn.Sequential(hvd.SyncBatchNorm(4))
    every: list[torch.nn.Module] = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    every.append(torch.optim.swa_utils.AveragedModel(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    every.append(torch.load(file, weights_only=False))
    for other in every:
        x = torch.full((2, 4), float(world.rank))
        torch.testing.assert_close(other(x), model(x))


@pytest.mark.ranks(3)
def test_copies_are_of_the_same_process_set(world: World) -> None:
    some = collective.add_process_set([0, 2])
    norm = hvd.SyncBatchNorm(4, process_set=some)
    assert copy.deepcopy(norm).process_set is some
    assert pickle.loads(pickle.dumps(norm)).process_set is some
    collective.remove_process_set(some)
