"""Training with DistributedOptimizer equals training in one process, in the ways that training scripts are written."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch

import collective.torch as hvd
from harness.plugin import World
from training import (
    SOME,
    WAYS,
    Layers,
    Twins,
    assert_same_on_all_ranks,
    bits,
    parameter,
    settings,
    sgd,
    values,
)

OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [
    partial(torch.optim.SGD, lr=0.1),
    partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    partial(torch.optim.AdamW, lr=torch.tensor(0.01), foreach=False),
    partial(torch.optim.AdamW, lr=0.01, fused=True),
    partial(torch.optim.Adagrad, lr=0.05),
    partial(torch.optim.RMSprop, lr=0.01, centered=True),
    partial(torch.optim.Adadelta),
    partial(torch.optim.Adamax),
    partial(torch.optim.NAdam),
    partial(torch.optim.RAdam),
    partial(torch.optim.ASGD),
]
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS.append(torch.optim.Muon)  # for matrices only


def trained(make: Callable[..., torch.optim.Optimizer], model: Layers) -> list[torch.Tensor]:
    matrices_only = make is getattr(torch.optim, "Muon", None)
    return [p for p in model.parameters() if p.dim() == 2 or not matrices_only]


@pytest.mark.ranks(1, 2, 3, 4)
def test_equals_one_process_on_the_concatenated_batch(world: World) -> None:
    batches = [[values((4, 5), rank, 7 + step) for rank in range(world.size)] for step in range(6)]
    for number, (threshold, shared_memory) in enumerate(WAYS):
        with settings(threshold, shared_memory=shared_memory):
            for make in OPTIMIZERS[number :: len(WAYS)]:
                one, model = Layers(), Layers()
                alone = make(trained(make, one))
                optimizer = hvd.DistributedOptimizer(make(trained(make, model)), model.named_parameters())
                assert isinstance(optimizer, type(alone))
                for batch in batches:
                    target = batch[::-1]
                    alone.zero_grad()
                    (one(torch.cat(batch)) - torch.cat(target)).square().mean().backward()
                    alone.step()
                    optimizer.zero_grad()
                    (model(batch[world.rank]) - target[world.rank]).square().mean().backward()
                    optimizer.step()
                for p, expected in zip(trained(make, model), trained(make, one), strict=True):
                    torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12, msg=lambda m, o=alone: f"{o}: {m}")
                assert_same_on_all_ranks(world, trained(make, model))


@pytest.mark.ranks(3)
def test_sum_over_uneven_batches_equals_one_process(world: World) -> None:
    one, model = Layers(), Layers()
    alone, optimizer = sgd(one.parameters()), hvd.DistributedOptimizer(sgd(model.parameters()), op=hvd.Sum)
    for step in range(5):
        batch = [values((2 * rank + 1, 5), rank, step) for rank in range(world.size)]
        for net, x, opt in ((one, torch.cat(batch), alone), (model, batch[world.rank], optimizer)):
            opt.zero_grad()
            (net(x) - 0.5).square().sum().mul(0.01).backward()
            opt.step()
    for p, expected in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.ranks(2, 3)
def test_many_steps_end_in_equal_bits(world: World) -> None:
    torch.manual_seed(world.rank)  # dropout differs
    dropout = torch.nn.Dropout(0.2)
    for (threshold, shared_memory), compression in itertools.product(
        WAYS, (hvd.Compression.none, hvd.Compression.bf16)
    ):
        with settings(threshold, shared_memory=shared_memory):
            model = Layers(depth=4, dtype=torch.float32)
            optimizer = hvd.DistributedOptimizer(
                torch.optim.AdamW(model.parameters(), lr=0.01), compression=compression
            )
            for _ in range(40):
                optimizer.zero_grad()
                x = torch.rand(3, 5) * (world.rank + 1)
                (model(dropout(x)) - x).square().mean().backward()
                optimizer.step()
            assert_same_on_all_ranks(world, model.parameters())


@pytest.mark.ranks(2)
def test_every_way_to_zero_gradients(world: World) -> None:
    ways: list[Callable[[Any, Any], None]] = [
        lambda optimizer, model: optimizer.zero_grad(),
        lambda optimizer, model: optimizer.zero_grad(set_to_none=True),
        lambda optimizer, model: optimizer.zero_grad(set_to_none=False),
        lambda optimizer, model: optimizer.zero_grad(False),
        lambda optimizer, model: model.zero_grad(),
        lambda optimizer, model: model.zero_grad(set_to_none=False),
        lambda optimizer, model: [p.grad.zero_() for p in model.parameters() if p.grad is not None],
    ]
    with settings(SOME):
        twins = Twins(world, Layers())
        for step, zero in enumerate(ways * 2):
            zero(twins.optimizer, twins.model)
            zero(twins.alone, twins.twin)
            twins.backward(lambda model, rank, step=step: model.loss(rank, step))
            twins.step()
            twins.check()


@pytest.mark.ranks(2)
def test_schedulers_made_before_and_after_wrapping(world: World) -> None:
    with settings(SOME):
        for wrap_first in (True, False):
            twins = Twins(world, Layers())
            if not wrap_first:
                twins.optimizer = torch.optim.SGD(twins.model.parameters(), lr=0.25, momentum=0.5)
            schedulers = [
                torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=9)  # changes the momentum as well
                for optimizer in (twins.optimizer, twins.alone)
            ]
            if not wrap_first:
                wrapped = hvd.DistributedOptimizer(twins.optimizer)
                assert wrapped is twins.optimizer
            for step in range(6):
                twins.train([lambda model, rank, step=step: model.loss(rank, step)])
                for scheduler in schedulers:
                    scheduler.step()
            twins.check()
            assert twins.optimizer.param_groups[0]["lr"] == twins.alone.param_groups[0]["lr"] != 0.25


@pytest.mark.ranks(2, 3)
def test_closures(world: World) -> None:
    optimizers = [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.LBFGS, lr=0.5, max_iter=5),
        partial(torch.optim.LBFGS, max_iter=8, line_search_fn="strong_wolfe"),
    ]
    with settings(SOME):
        for make in optimizers:
            twins = Twins(world, Layers(), make)
            for step in range(3):

                def closure(step: int = step, twins: Twins = twins) -> torch.Tensor:
                    twins.optimizer.zero_grad()
                    loss = twins.model.loss(world.rank, step)
                    loss.backward()
                    return loss

                def closure_alone(step: int = step, twins: Twins = twins) -> torch.Tensor:
                    twins.alone.zero_grad()
                    loss = sum(twins.twin.loss(rank, step) for rank in range(world.size)) / world.size
                    loss.backward()
                    return loss

                loss = twins.optimizer.step(closure) if step else twins.optimizer.step(closure=closure)
                expected = twins.alone.step(closure_alone)
                if isinstance(twins.alone, torch.optim.LBFGS):
                    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
                twins.check(1e-8)  # L-BFGS divides by small differences


@pytest.mark.ranks(2)
def test_state_dict_round_trip(world: World) -> None:
    def losses(steps: Iterable[int]) -> list[Any]:
        return [lambda model, rank, step=step: model.loss(rank, step) for step in steps]

    with settings(SOME):
        twins = Twins(world, Layers(), partial(torch.optim.Adam, lr=0.01))
        twins.train(losses(range(3)))
        saved = io.BytesIO()
        torch.save((twins.model.state_dict(), twins.optimizer.state_dict()), saved)
        assert copy.deepcopy(twins.optimizer.state_dict()).keys() == twins.alone.state_dict().keys()
        twins.train(losses(range(3, 6)))
        ends = [bits(p) for p in twins.model.parameters()]
        twins.check()

        fresh = Twins(world, Layers(), partial(torch.optim.Adam, lr=0.5))
        for restored in (twins, fresh):  # into the same optimizer, and into another
            saved.seek(0)
            model_state, optimizer_state = torch.load(saved)
            restored.model.load_state_dict(model_state)
            restored.optimizer.load_state_dict(optimizer_state)
            for loss in losses(range(3, 6)):
                restored.optimizer.zero_grad()
                loss(restored.model, world.rank).backward()
                restored.optimizer.step()
            assert [bits(p) for p in restored.model.parameters()] == ends


@pytest.mark.ranks(2)
def test_copies(world: World) -> None:
    """A copied model is free of the optimizer; an optimizer cannot be copied, which must not pass unnoticed."""
    model = Layers()
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()))
    clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for clone in clones if world.rank == 0 else []:
        clone.loss(world.rank).backward()  # concerns nobody else
    for clone in clones:
        assert [bits(p) for p in clone.parameters()] == [bits(p) for p in model.parameters()]
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            attempt(optimizer)


@pytest.mark.ranks(2)
def test_attributes_stay_those_of_the_class(world: World) -> None:
    inner = torch.optim.AdamW([parameter(3)], lr=0.125)
    groups, state = inner.param_groups, inner.state
    optimizer = hvd.DistributedOptimizer(inner)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert type(optimizer).__name__ == "AdamW"
    assert repr(optimizer).startswith("AdamW (")
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]


@pytest.mark.ranks(2)
def test_compiled_model(world: World) -> None:
    with settings(SOME):
        twins = Twins(world, Layers())
        compiled = torch.compile(twins.model, backend="aot_eager")  # needs no C++ compiler
        for step in range(3):
            x = [values((4, 5), rank, step) for rank in range(world.size)]
            twins.zero_grad()
            twins.backward_alone(lambda model, rank, x=x: (model(x[rank]) - 1).square().mean())
            (compiled(x[world.rank]) - 1).square().mean().backward()
            twins.step()
            twins.check()
