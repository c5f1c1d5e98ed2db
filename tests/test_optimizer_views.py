"""Gradients that are views of the buckets in which they are reduced."""

import contextlib
import gc
import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import collective
import collective.torch as hvd
from harness.plugin import World
from training import ALL, EACH_ITS_OWN, SOME, WAYS, Layers, Twins, assert_same_on_all_ranks, parameter, settings, values


@contextlib.contextmanager
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def addresses(model: torch.nn.Module) -> list[int]:
    return [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("set_to_none", [False, True])
def test_training_with_views(world: World, set_to_none: bool) -> None:
    """Gradients have fixed places, and are right however they come there: made anew, added to, promised passes."""
    for threshold, shared_memory in WAYS:
        with settings(threshold, shared_memory=shared_memory):
            twins = Twins(world, Layers(), gradient_as_bucket_view=True, backward_passes_per_step=2)
            places = []
            for step in range(6):
                twins.zero_grad(set_to_none=set_to_none)
                for number in range(2):
                    twins.backward(lambda model, rank, s=step, n=number: model.loss(rank, 10 * s + n))
                twins.optimizer.synchronize()
                for net in (twins.model, twins.twin):
                    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
                twins.step()
                twins.check()
                places.append(addresses(twins.model))
            if world.size > 1:
                assert places == [places[0]] * 6


@pytest.mark.ranks(2, 3)
def test_views_are_there_by_default_until_they_could_be_noticed(world: World) -> None:
    with settings(EACH_ITS_OWN):
        twins = Twins(world, Layers())
        twins.train([lambda model, rank, s=step: model.loss(rank, s) for step in range(2)])
        views = addresses(twins.model)
        twins.train([lambda model, rank: model.loss(rank, 2)])
        assert addresses(twins.model) == views
        # Gradients that stay are moved away when backward adds to them, so that the reduction does not.
        twins.zero_grad(set_to_none=False)
        for number in range(3):  # more than promised
            twins.backward(lambda model, rank, s=number: model.loss(rank, 3 + s))
        twins.step()
        twins.check()
        moved = addresses(twins.model)
        assert not set(views) & set(moved)
        twins.zero_grad(set_to_none=False)
        twins.backward(lambda model, rank: model.loss(rank, 7))
        twins.step()
        twins.check()
        assert addresses(twins.model) == moved
    with settings(ALL):
        twins = Twins(world, Layers(), gradient_as_bucket_view=False)
        twins.train([lambda model, rank, s=step: model.loss(rank, s) for step in range(3)])
        twins.check()
        own = [p.grad.untyped_storage().resizable() for p in twins.model.parameters()]
        assert all(own)  # made by torch


@pytest.mark.ranks(2)
@pytest.mark.parametrize("as_view", [None, True])
def test_gradients_in_a_buffer_of_the_users_own(world: World, as_view: bool | None) -> None:
    """Whoever keeps gradients in one flat buffer finds the results there."""
    with settings(EACH_ITS_OWN):
        model = Layers()
        parameters = list(model.parameters())
        flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        optimizer: Any = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.0), gradient_as_bucket_view=as_view)
        for step in range(3):
            flat.zero_()
            at = 0
            for p in parameters:
                p.grad = flat[at : at + p.numel()].view_as(p)
                at += p.numel()
            model.loss(world.rank, step).backward()  # type: ignore[no-untyped-call]
            optimizer.synchronize()
            assert_same_on_all_ranks(world, [flat])
            expected = torch.zeros_like(flat)
            for rank in range(world.size):
                grads = torch.autograd.grad(model.loss(rank, step), parameters)
                expected += torch.cat([grad.reshape(-1) for grad in grads]) / world.size
            torch.testing.assert_close(flat, expected)
            optimizer.step()


@pytest.mark.ranks(2, 3)
@pytest.mark.limit(30)
@pytest.mark.parametrize("what", ["another pass", "a clip", "another rank's pass", "zeroed"])
def test_a_gradient_that_changes_in_flight_is_an_error_on_every_rank(world: World, what: str) -> None:
    """With views only, whose first value is gone; training goes on after it."""
    with settings(EACH_ITS_OWN):
        twins = Twins(world, Layers(), gradient_as_bucket_view=True)
        twins.train([lambda model, rank: model.loss(rank)])
        twins.zero_grad(set_to_none=False)
        twins.backward(lambda model, rank: model.loss(rank, 1))
        if what == "another pass" or (what == "another rank's pass" and world.rank == 1):
            twins.model.loss(world.rank, 2).backward()
        elif what == "a clip":
            torch.nn.utils.clip_grad_norm_(twins.model.parameters(), 1e-3)
        elif what == "zeroed":
            twins.optimizer.zero_grad(set_to_none=False)
        with pytest.raises(collective.GradientChangedError, match=r"bucket of '2\.(weight|bias)'"):
            twins.optimizer.step()
        twins.alone.step()  # the parameters of the two stay apart, those of the ranks alike
        for step in range(3):
            twins.optimizer.zero_grad()
            twins.model.loss(world.rank, step).backward()
            twins.optimizer.step()
        assert_same_on_all_ranks(world, twins.model.parameters())


@pytest.mark.ranks(2)
def test_a_pass_too_many_is_no_error_when_gradients_were_dropped(world: World) -> None:
    with settings(EACH_ITS_OWN):
        twins = Twins(world, Layers(), gradient_as_bucket_view=True)
        for step in range(4):
            twins.zero_grad()
            for number in range(3):
                twins.backward(lambda model, rank, s=step, n=number: model.loss(rank, 10 * s + n))
            twins.step()
            twins.check()


@pytest.mark.ranks(2, 3)
@pytest.mark.limit(30)
def test_parameters_that_come_and_change(world: World) -> None:
    with settings(EACH_ITS_OWN):
        twins = Twins(world, Layers(), gradient_as_bucket_view=True)
        for step in range(8):
            if step in (2, 5):
                for net, optimizer in ((twins.model, twins.optimizer), (twins.twin, twins.alone)):
                    layer = torch.nn.Linear(5, 5, bias=False, dtype=torch.float64)
                    layer.weight = parameter(5, 5, salt=step)
                    net.append(layer)
                    optimizer.add_param_group({"params": list(layer.parameters())})
            if step == 4:
                for net in (twins.model, twins.twin):
                    net[1].requires_grad_(False)
            if step == 6:
                state = [optimizer.state_dict() for optimizer in (twins.optimizer, twins.alone)]
                twins.optimizer.load_state_dict(state[0])
                twins.alone.load_state_dict(state[1])
            twins.zero_grad(set_to_none=False)
            twins.backward(lambda model, rank, s=step: model.loss(rank, s))
            twins.step()
            twins.check()
        twins.zero_grad(set_to_none=False)
        twins.backward(lambda model, rank: model.loss(rank, 9))
        twins.optimizer.add_param_group({"params": [parameter(3)]})  # too late
        with pytest.raises(collective.GradientChangedError, match="added or removed between backward and step"):
            twins.optimizer.step()


@pytest.mark.ranks(2)
def test_another_dtype(world: World) -> None:
    for as_view in (None, True, False):
        with settings(SOME):
            model = Layers()
            optimizer: Any = hvd.DistributedOptimizer(sgd_of(model), gradient_as_bucket_view=as_view)
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float64):
                model.to(dtype)
                for step in range(2):
                    optimizer.zero_grad()
                    model.loss(world.rank, step).backward()  # type: ignore[no-untyped-call]
                    optimizer.synchronize()
                    grads = [p.grad for p in model.parameters()]
                    assert all(grad is not None and grad.dtype == dtype for grad in grads)
                    assert_same_on_all_ranks(world, grads)
                    optimizer.step()


def sgd_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.125)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("as_view", [None, True])
def test_sparse_and_shared_parameters(world: World, as_view: bool | None) -> None:
    class Words(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(7, 5, sparse=True, dtype=torch.float64)
            self.table.weight = parameter(7, 5)
            self.layers = Layers()
            self.layers[2].weight = self.layers[0].weight

        def loss(self, rank: int, step: int) -> torch.Tensor:
            x = self.table(torch.tensor([(rank + step) % 7, 3, 3]))
            return self.layers(x).square().mean()

    with settings(ALL):
        twins = Twins(world, Words(), partial(torch.optim.SGD, lr=0.1), gradient_as_bucket_view=as_view)
        for step in range(4):
            twins.zero_grad(set_to_none=step % 2 == 0)
            twins.backward(lambda model, rank, s=step: model.loss(rank, s))
            twins.step()
            twins.check()
            assert twins.model.table.weight.grad.is_sparse


@pytest.mark.ranks(2)
def test_compressed_gradients_are_no_views(world: World) -> None:
    with settings(ALL):
        p, q = parameter(4, dtype=torch.float32), parameter(3, dtype=torch.bfloat16)
        optimizer: Any = hvd.DistributedOptimizer(
            torch.optim.SGD([p, q], lr=1), compression=hvd.Compression.bf16, gradient_as_bucket_view=True
        )
        for step in range(2):
            for x in (p, q):
                x.grad = values(x.shape, world.rank, step, x.dtype)
            given = [x.grad for x in (p, q)]
            optimizer.step()
            assert p.grad is given[0]
            assert q.grad is not given[1]  # travels as it is
            assert_same_on_all_ranks(world, [p.grad, q.grad])


@pytest.mark.ranks(2)
def test_views_outlive_their_buckets(world: World) -> None:
    with settings(ALL):
        model = Layers()
        optimizer: Any = hvd.DistributedOptimizer(sgd_of(model), gradient_as_bucket_view=True)
        model.loss(world.rank).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        grads = [p.grad for p in model.parameters()]
        copies = [grad.clone() for grad in grads]
        file = io.BytesIO()
        torch.save(grads[0], file)
        assert file.tell() < 3000  # not the whole bucket
        del optimizer, model
    assert all(torch.equal(grad, copy) for grad, copy in zip(grads, copies, strict=True))


@pytest.mark.ranks(3)
def test_buckets_come_in_the_order_of_gradients(world: World) -> None:
    """In the mean over ranks; what has none comes last."""
    with settings(EACH_ITS_OWN):
        model = Layers(4)
        optimizer: Any = hvd.DistributedOptimizer(sgd_of(model), model.named_parameters())
        order = [0, 2, 1] if world.rank == 0 else [2, 0, 1]
        for step in range(2):
            optimizer.zero_grad()
            model.loss(world.rank, step, order).backward()
            optimizer.step()
        plan = [[slot.name for slot in bucket.slots] for bucket in optimizer._reducer._rounds.plan.buckets]
        layers = list(dict.fromkeys(name.split(".")[0] for bucket in plan for name in bucket))
        assert layers == ["1", "0", "2", "3"]
        assert len(set(map(str, world.comm.allgather(plan)))) == 1


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("as_view", [None, True])
def test_gradients_that_data_was_assigned_to(world: World, as_view: bool | None) -> None:
    """`p.grad.data = x`, as Module.to() does it: the same tensor object lies elsewhere then."""
    p = torch.nn.Parameter(torch.zeros(50))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([p], lr=1.0), [("p", p)], gradient_as_bucket_view=as_view, op=hvd.Sum
    )
    total = 0.0
    for step in range(8):
        optimizer.zero_grad(set_to_none=step % 4 < 2)
        if step >= 4 and p.grad is not None:
            p.grad.data = p.grad.data.clone()  # before backward adds to it
        (p * (world.rank + step)).sum().backward()
        if step == 3:
            p.grad.data = p.grad.data * 10
        optimizer.step()
        wanted = sum(rank + step for rank in range(world.size)) * (10 if step == 3 else 1)
        assert (p.grad == wanted).all(), (step, p.grad[0], wanted)
        total -= wanted
        assert (p == total).all()
        p.grad.data = p.grad.data.clamp(-1e6, 1e6)


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("as_view", [None, False])
def test_another_dtype_with_gradients_kept(world: World, as_view: bool | None) -> None:
    model = torch.nn.Linear(300, 300, bias=False).double()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model.named_parameters(), gradient_as_bucket_view=as_view
    )
    for dtype in (torch.float64, torch.float32, torch.float64):
        model.to(dtype)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=False)
            model(torch.full((1, 300), world.rank + 1.0, dtype=dtype)).sum().backward()
            optimizer.step()
            assert model.weight.grad is not None
            assert model.weight.grad.dtype == dtype
            assert (model.weight.grad == (world.size + 1) / 2).all()


@pytest.mark.ranks(2, 3)
def test_parameters_that_change_after_an_error(world: World) -> None:
    p, q = (torch.nn.Parameter(torch.zeros(20_000)) for _ in range(2))
    with settings(EACH_ITS_OWN):
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([p], lr=0.0), [("p", p)], gradient_as_bucket_view=True, op=hvd.Sum
        )
        for extra in (False, True, True):
            optimizer.zero_grad(set_to_none=False)
            if extra and len(optimizer.param_groups) == 1:
                optimizer.add_param_group({"params": [q]})
            loss = p.sum() + (q.sum() if extra else 0)
            loss.backward()
            if not extra:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
                p.sum().backward()
                p.sum().backward()  # a pass too many
                with contextlib.suppress(collective.GradientChangedError):
                    optimizer.synchronize()
                continue
            optimizer.step()
            assert q.grad is not None
            assert (q.grad == world.size).all()


@pytest.mark.ranks(1, 2, 3)
def test_gradients_that_a_script_keeps(world: World) -> None:
    """They stay as they were, as in one process; in buckets of shared memory and of messages."""
    for threshold, shared_memory in WAYS:
        with settings(threshold, shared_memory=shared_memory):
            twins = Twins(world, Layers())
            kept: list[list[torch.Tensor]] = []
            copies: list[list[torch.Tensor]] = []
            for step in range(4):
                twins.train([lambda model, rank, s=step: model.loss(rank, s)])
                twins.check()
                kept.append([p.grad for p in twins.model.parameters()])
                copies.append([grad.clone() for grad in kept[-1]])
            for grads, expected in zip(kept, copies, strict=True):
                for grad, copy in zip(grads, expected, strict=True):
                    assert torch.equal(grad, copy)
            del kept, grads, grad
            twins.train([lambda model, rank: model.loss(rank, 4)])
            views = addresses(twins.model)
            twins.train([lambda model, rank: model.loss(rank, 5)])
            assert addresses(twins.model) == views or world.size == 1  # nobody has kept them, so they stay views


@pytest.mark.ranks(2)
def test_what_shares_memory_with_a_gradient_of_before(world: World) -> None:
    """It cannot be moved: the script is warned, once, and results are copied from then on."""
    p = parameter(3)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=0.0), named_parameters=[("p", p)])
    keeps: list[Callable[[torch.Tensor], Any]] = [
        lambda grad: grad.detach(),
        lambda grad: grad.numpy(),
        lambda grad: grad[1:],
        lambda grad: grad.untyped_storage(),
        lambda grad: np.from_dlpack(grad),
    ]
    for keep in keeps:
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=0.0), named_parameters=[("p", p)])
        kept: Any = None
        for step in range(3):
            optimizer.zero_grad()
            told = pytest.warns(UserWarning, match="gradient of 'p'.*gradient_as_bucket_view=False")
            with told if step == 1 else warnings_are_errors():
                (p * step).sum().backward()
                optimizer.step()
            assert p.grad is not None
            assert torch.equal(p.grad, torch.full_like(p, step))
            kept = keep(p.grad) if step == 0 else kept
        del kept


@pytest.mark.ranks(2)
def test_a_graph_that_has_saved_a_gradient(world: World) -> None:
    """Results that are written into a gradient are a change in place like any other: backward through what it was
    raises, rather than be wrong."""
    for as_view in (None, False, True):
        p, q = parameter(3), parameter(3)
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=0.0), gradient_as_bucket_view=as_view)
        for step in range(2):
            p.sum().backward()
            optimizer.step()
            if step == 0:
                assert p.grad is not None
                saved = (q * p.grad).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.backward()


@pytest.mark.ranks(2)
def test_memory_of_a_gradient_that_dlpack_has(world: World) -> None:
    """It stays, for whoever reads it, when the gradient has moved and the runtime has ended."""
    for set_to_none in (True, False):
        with settings(ALL):
            p = parameter(3)
            optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=0.0))
            p.sum().backward()
            optimizer.step()
            assert p.grad is not None
            array = np.from_dlpack(p.grad)
            optimizer.zero_grad(set_to_none=set_to_none)
            (p * 5).sum().backward()
            with pytest.warns(UserWarning, match="DLPack"):
                optimizer.step()
            assert torch.equal(p.grad, torch.full_like(p, 5.0))
            del optimizer, p
        gc.collect()
        assert np.isfinite(array).all()


@pytest.mark.ranks(2)
def test_warnings_that_are_errors(world: World) -> None:
    """They come when all is under way, and once: ranks stay in step."""
    p = parameter(3)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=0.0))
    kept: Any = None
    for step in range(4):
        optimizer.zero_grad()
        p.sum().backward()
        with warnings_are_errors():
            if step == 1 and world.rank == 0:
                with pytest.raises(UserWarning, match="earlier gradient"):
                    optimizer.step()
            else:
                optimizer.step()
        assert p.grad is not None
        if step == 0 and world.rank == 0:
            kept = p.grad.detach()
    assert torch.equal(p.grad, torch.ones_like(p))
    del kept


@pytest.mark.ranks(2)
def test_a_gradient_whose_data_was_replaced_and_is_kept(world: World) -> None:
    """Nothing of the bucket's is read any more: no warning, and it is a view again."""
    p = parameter(3)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=0.0))
    with warnings_are_errors():
        for step in range(3):
            optimizer.zero_grad()
            p.sum().backward()
            optimizer.step()
            if step == 0:
                assert p.grad is not None
                x = torch.full_like(p, 9.0)
                p.grad.data = x
    assert torch.equal(x, torch.full_like(p, 9.0))
