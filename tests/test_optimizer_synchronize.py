"""What stands between backward and step(): clipping, unscaling, synchronize()."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import collective.torch as hvd
from harness.plugin import World
from training import ALL, EACH_ITS_OWN, SOME, WAYS, Layers, Twins, assert_same_on_all_ranks, settings, values

CHANGES: list[Callable[[torch.Tensor, float], Any]] = [
    lambda p, factor: p.grad.mul_(factor),
    lambda p, factor: p.grad.detach().mul_(factor),
    lambda p, factor: torch._foreach_mul_([p.grad], factor),
    lambda p, factor: setattr(p, "grad", p.grad * factor),
    lambda p, factor: p.grad.copy_(p.grad.clone() * factor),
]


@pytest.mark.ranks(2, 3)
def test_changes_before_the_reduction_count(world: World) -> None:
    """Buckets have started during backward when this rank's gradients change; also when only one rank's do."""
    for threshold, shared_memory in WAYS:
        with settings(threshold, shared_memory=shared_memory):
            twins = Twins(world, Layers())
            for step, change in enumerate(CHANGES * 2):
                factors = [rank + 2 if step < len(CHANGES) else 1 + (rank == 1) for rank in range(world.size)]
                twins.zero_grad()
                twins.backward_alone(lambda model, rank, s=step, f=factors: model.loss(rank, s) * f[rank])
                twins.model.loss(world.rank, step).backward()
                if factors[world.rank] != 1:
                    for p in twins.model.parameters():
                        change(p, factors[world.rank])
                twins.step()
                twins.check()


@pytest.mark.ranks(2)
def test_clipping_before_the_reduction(world: World) -> None:
    with settings(SOME):
        twins = Twins(world, Layers())
        for step in range(4):
            twins.zero_grad()
            twins.model.loss(world.rank, step).backward()
            norm = float(torch.nn.utils.clip_grad_norm_(twins.model.parameters(), 0.01 * (1 + world.rank)))
            factors = [0.01 * (1 + r) / (n + 1e-6) for r, n in enumerate(world.comm.allgather(norm))]
            assert max(factors) < 1
            twins.backward_alone(lambda model, rank, s=step, f=factors: model.loss(rank, s) * f[rank])
            twins.step()
            twins.check()


@pytest.mark.ranks(2, 3)
def test_clipping_the_reduced_gradient(world: World) -> None:
    with settings(SOME):
        for skip in (True, False):
            twins = Twins(world, Layers())
            for step in range(5):
                twins.zero_grad()
                twins.backward(lambda model, rank, step=step: model.loss(rank, step))
                twins.optimizer.synchronize()
                norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.01) for m in (twins.model, twins.twin)]
                assert norms[0] > 0.01
                torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
                if skip:
                    with twins.optimizer.skip_synchronize():
                        twins.step()
                else:
                    twins.step()
                twins.check()


@pytest.mark.ranks(2, 3)
def test_synchronize_is_for_one_step(world: World) -> None:
    """What comes after the step is reduced, whichever way the step took, and however it came."""

    def first(model: Any, rank: int) -> Any:
        return model.loss(rank, 1)

    def on_some_ranks(model: Any, rank: int) -> Any:
        return model.loss(rank, 2) if rank == 1 else None

    with settings(SOME):
        for skip in (True, False):
            for accumulate_only in (True, False):
                twins = Twins(world, Layers())
                twins.train([first])
                twins.zero_grad()
                twins.backward(first)
                twins.optimizer.synchronize()
                with twins.optimizer.skip_synchronize() if skip else contextlib.nullcontext():
                    twins.step()
                twins.check()
                twins.zero_grad()
                with twins.optimizer.no_sync() if accumulate_only else contextlib.nullcontext():
                    twins.backward(first if accumulate_only else on_some_ranks)
                twins.step()
                twins.check()


@pytest.mark.ranks(2)
def test_synchronize_without_a_step(world: World) -> None:
    """A scaler that has seen an infinity leaves the step out; then some ranks have no gradient at all."""
    with settings(SOME):
        twins = Twins(world, Layers())
        twins.train([lambda model, rank: model.loss(rank)])
        twins.model.loss(world.rank).backward()
        twins.optimizer.synchronize()
        twins.train([lambda model, rank: model.loss(rank, 1) if rank == 1 else None])
        twins.check()


@pytest.mark.ranks(3)
def test_synchronize_again_does_not_sum_again(world: World) -> None:
    with settings(SOME):
        twins = Twins(world, Layers(), op=hvd.Sum)
        twins.zero_grad()
        twins.backward_alone(lambda model, rank: model.loss(rank) * world.size)
        twins.model.loss(world.rank).backward()
        for _ in range(3):
            twins.optimizer.synchronize()
        twins.step()
        twins.check()


@pytest.mark.ranks(2, 3)
def test_grad_scaler(world: World) -> None:
    """The recipe for mixed precision; when one rank's gradients overflow, all ranks leave the step out."""
    with settings(SOME):
        twins = Twins(world, Layers())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for step in range(8):
            overflow = step in (2, 5)
            factor = float("inf") if overflow and world.rank == 1 else 1.0
            twins.zero_grad()
            scaler.scale(twins.model.loss(world.rank, step) * factor).backward()
            twins.optimizer.synchronize()
            scaler.unscale_(twins.optimizer)
            torch.nn.utils.clip_grad_norm_(twins.model.parameters(), 100.0)
            with twins.optimizer.skip_synchronize():
                scaler.step(twins.optimizer)
            before = scaler.get_scale()
            scaler.update()
            assert (scaler.get_scale() < before) == overflow
            if overflow:
                assert_same_on_all_ranks(world, twins.model.parameters())
            else:
                twins.backward_alone(lambda model, rank, step=step: model.loss(rank, step))
                twins.alone.step()
                twins.check()


@pytest.mark.ranks(2)
@pytest.mark.limit(30)
def test_grad_scaler_without_synchronize(world: World) -> None:
    """The single-process script, unchanged: buckets have started when the scaler unscales what they were given."""
    with settings(SOME, timeout=10):
        for unscale_first in (True, False):
            twins = Twins(world, Layers())
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            for step in range(4):
                overflow = step == 2
                factor = float("inf") if overflow and world.rank == 1 else 1.0
                twins.zero_grad()
                scaler.scale(twins.model.loss(world.rank, step) * factor).backward()
                if unscale_first:
                    scaler.unscale_(twins.optimizer)
                scaler.step(twins.optimizer)
                scaler.update()
                assert len(set(world.comm.allgather(scaler.get_scale()))) == 1
                if not overflow:
                    twins.backward_alone(lambda model, rank, step=step: model.loss(rank, step))
                    twins.alone.step()
                    twins.check()


@pytest.mark.ranks(2, 3)
def test_gradients_that_the_script_reduces_itself(world: World) -> None:
    """A collective in place between backward and step is a change like any other."""
    for threshold in (EACH_ITS_OWN, ALL):
        with settings(threshold):
            model = Layers()
            optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0))
            for step in range(3):
                optimizer.zero_grad()
                model.loss(world.rank, step).backward()
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                least = [hvd.allreduce(grad, op=hvd.Min) for grad in grads]
                hvd.grouped_allreduce_(grads, op=hvd.Min)
                optimizer.step()
                for p, expected in zip(model.parameters(), least, strict=True):
                    torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.ranks(2)
def test_a_collective_in_place_on_what_autograd_has_saved(world: World) -> None:
    ways: list[Callable[[torch.Tensor], Any]] = [
        lambda x: hvd.allreduce_(x, op=hvd.Sum),
        lambda x: hvd.synchronize(hvd.allreduce_async_(x)),
        lambda x: hvd.broadcast_(x, 0),
        lambda x: hvd.recv(x, 1 - world.rank) if world.rank else hvd.send(x, 1) or x.add_(1),
        lambda x: hvd.broadcast_parameters([x]),
    ]
    for way in ways:
        a = torch.ones(3, requires_grad=True)
        b = a * 2
        c = (b * b).sum()
        way(b.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            c.backward()
    with torch.inference_mode():
        hvd.allreduce_(torch.ones(2))  # has no version


@pytest.mark.ranks(2, 3)
def test_lbfgs_with_a_loss_that_is_a_number(world: World) -> None:
    """It keeps double precision, as all floats of Python, and step() returns a float."""
    x = torch.full((3,), 5.0, dtype=torch.float64, requires_grad=True)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.LBFGS([x], max_iter=40, line_search_fn="strong_wolfe", tolerance_change=0, tolerance_grad=0)
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = (x - world.rank).square().sum() + 1e5
        loss.backward()
        return float(loss.detach())

    for _ in range(5):
        loss = optimizer.step(closure)
    assert isinstance(loss, float)
    torch.testing.assert_close(x.detach(), torch.full_like(x, (world.size - 1) / 2), rtol=0, atol=1e-8)


@pytest.mark.ranks(2)
def test_a_compiled_step(world: World) -> None:
    """What waits for other ranks stays outside the graph."""
    twins = Twins(world, Layers())
    inputs = [[values((4, 5), rank, step) for rank in range(world.size)] for step in range(3)]

    def step(x: torch.Tensor) -> None:
        twins.optimizer.zero_grad()
        twins.model(x).square().mean().backward()
        twins.optimizer.step()

    compiled = torch.compile(step, backend="eager")
    for xs in inputs:
        compiled(xs[world.rank])
        twins.alone.zero_grad()
        twins.backward_alone(lambda model, rank, xs=xs: model(xs[rank]).square().mean())
        twins.alone.step()
        twins.check()
