"""What ranks must agree on for DistributedOptimizer, and what its caller must get right."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import collective
import collective.torch as hvd
from harness.plugin import World
from training import ALL, EACH_ITS_OWN, SOME, Layers, Twins, parameter, settings, sgd, values

Named = list[tuple[str, torch.nn.Parameter]]


def with_b(*shape: int, dtype: torch.dtype = torch.float64) -> Callable[[Named], Named]:
    return lambda three: [three[0], ("b", parameter(*shape, dtype=dtype)), three[2]]


# What is done to parameters a, b, c on rank 1, and what every rank is told.
DIFFERENCES: list[tuple[Callable[[Named], Named], str]] = [
    (with_b(3, 2), r"b float64 \(2, 3\).* on ranks? 0.*; b float64 \(3, 2\).* on rank 1"),
    (with_b(2, 3, dtype=torch.float32), r"b float64 \(2, 3\).* on ranks? 0.*; b float32 \(2, 3\).* on rank 1"),
    (lambda three: three[1:], r"a float64 \(3,\).* on ranks? 0"),
    (lambda three: three[:2], r"c float64 \(4,\).* on ranks? 0.*; b float64 \(2, 3\).* on rank 1"),
    (lambda three: [(name + "x", p) for name, p in three], "c float64 .*; cx float64 .* on rank 1"),
    (lambda three: three[::-1], "c float64 .*; a float64 .* on rank 1"),
]
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"op": hvd.Sum}, "reduction differs: Average on ranks? 0.*; Sum on rank 1"),
    ({"compression": hvd.Compression.bf16}, "compression differs: none on ranks? 0.*; bfloat16 on rank 1"),
    ({"gradient_predivide_factor": 2.0}, "prescale_factor differs: 1 on ranks? 0.*; 0.5 on rank 1"),
]


@pytest.mark.ranks(2, 3)
def test_the_threshold_of_rank_0_cuts_the_buckets(world: World) -> None:
    """Ranks whose environment differs, as on nodes that are set up by hand, train all the same."""
    with settings(EACH_ITS_OWN if world.rank == 0 else ALL):
        parameters = [torch.nn.Parameter(torch.zeros(100)) for _ in range(6)]
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), op=hvd.Sum)
        for step in range(3):
            for n, p in enumerate(parameters):
                p.grad = torch.full((100,), float((world.rank + 1) * (n + step)))
            optimizer.step()
            optimizer.zero_grad()
        ranks = world.size * (world.size + 1) // 2
        assert [p.unique().tolist() for p in parameters] == [[-ranks * (3.0 * n + 3)] for n in range(6)]


@pytest.mark.ranks(2, 3)
def test_different_models(world: World) -> None:
    """Every rank learns what differs first, in the order of the buckets, and the job goes on."""
    for threshold in (EACH_ITS_OWN, SOME):
        with settings(threshold):
            cases = [(change, {}, message) for change, message in DIFFERENCES]
            cases += [(lambda three: three, options, message) for options, message in OPTIONS]
            for change, options, message in cases:
                named = [("a", parameter(3)), ("b", parameter(2, 3)), ("c", parameter(4))]
                if world.rank == 1:
                    named = change(named)
                optimizer = hvd.DistributedOptimizer(
                    sgd([p for _, p in named]), named, **(options if world.rank == 1 else {})
                )
                for _ in range(2):
                    with pytest.raises(collective.MismatchError, match=message):  # noqa: PT012 - from either
                        sum(p.sum() for _, p in named).backward()
                        optimizer.step()
                assert hvd.allreduce(torch.tensor(world.rank), op=hvd.Sum) == sum(range(world.size))
                twins = Twins(world, Layers())
                twins.train([lambda model, rank: model.loss(rank)])
                twins.check()


@pytest.mark.ranks(2)
@pytest.mark.limit(30)
def test_frozen_on_one_rank_only(world: World) -> None:
    with settings(SOME, timeout=10):
        p = parameter(3).requires_grad_(world.rank == 0)
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=1), [("alone", p)])
        with pytest.raises(collective.MismatchError, match="alone"):
            optimizer.step()


@pytest.mark.ranks(2)
@pytest.mark.limit(30)
def test_unfrozen_on_one_rank_only(world: World) -> None:
    with settings(SOME, timeout=10):
        p, q = parameter(3), parameter(2).requires_grad_(False)
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p, q], lr=1), [("p", p), ("late", q)])
        optimizer.step()
        q.requires_grad_(world.rank == 1)
        with pytest.raises(collective.MismatchError, match="late"):
            optimizer.step()


@pytest.mark.ranks(2)
@pytest.mark.limit(30)
def test_mismatch_can_be_put_right(world: World) -> None:
    with settings(SOME, timeout=10):
        model = Layers()
        model[2].bias.requires_grad_(world.rank == 0)
        twins = Twins(world, model)
        with pytest.raises(collective.MismatchError, match=r"2\.bias"):
            twins.train([lambda model, rank: model.loss(rank)])
        for net in (twins.model, twins.twin):
            net[2].bias.requires_grad_(True)
        twins.train([lambda model, rank: model.loss(rank)])
        twins.check()


@pytest.mark.ranks(2)
def test_transposed_on_one_rank_only(world: World) -> None:
    """Memory layout is each rank's own business."""
    p = torch.nn.Parameter(torch.ones(3, 2).t() if world.rank else torch.ones(2, 3))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=1), op=hvd.Sum)
    (p * torch.arange(6.0).reshape(2, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(p, 1 - 2 * torch.arange(6.0).reshape(2, 3))


@pytest.mark.ranks(2)
@pytest.mark.limit(30)
def test_backward_never_waits_for_other_ranks(world: World) -> None:
    """In the very first backward only some ranks complete a bucket; others come to another operation first."""
    with settings(EACH_ITS_OWN, timeout=10):
        twins = Twins(world, Layers())
        twins.backward(lambda model, rank: model.loss(rank) if rank == 0 else None)
        assert hvd.allreduce(torch.tensor(1), op=hvd.Sum) == 2
        twins.step()
        twins.check()


@pytest.mark.ranks(2)
@pytest.mark.limit(30)
def test_optimizer_that_is_gone_takes_part_in_nothing(world: World) -> None:
    with settings(EACH_ITS_OWN, timeout=10):
        model = Layers()
        for started in (False, True):
            optimizer = hvd.DistributedOptimizer(sgd(model.parameters()))
            if started:
                model.loss(world.rank).backward()
                optimizer.step()
                model.loss(world.rank).backward()  # its buckets are on their way
            gone = weakref.ref(optimizer), weakref.ref(optimizer._reducer)
            del optimizer
            gc.collect()
            if world.rank == 0:
                model.loss(world.rank).backward()
            assert [reference() for reference in gone] == [None, None]
        model.zero_grad()
        twins = Twins(world, model)
        twins.train([lambda model, rank: model.loss(rank)] * 3)
        twins.check()


@pytest.mark.ranks(2)
def test_optimizer_of_a_runtime_that_has_ended(world: World) -> None:
    """It goes on in the next one: its plan is agreed on anew, and so is its name."""
    other = hvd.DistributedOptimizer(torch.optim.SGD([parameter(3)], lr=1.0))
    twins = Twins(world, Layers())
    for threshold in (SOME, ALL):
        with settings(threshold):  # starts the runtime anew
            for _ in range(2):
                twins.train([lambda model, rank: model.loss(rank)])
                twins.check()
    collective.shutdown()
    with pytest.raises(collective.NotInitializedError):
        hvd.DistributedOptimizer(sgd(Layers().parameters()))
    with pytest.raises(collective.NotInitializedError):
        other.step()
    collective.init()
    twins.train([lambda model, rank: model.loss(rank)])
    twins.check()
    other.step()


@pytest.mark.ranks(1, 2)
def test_wrong_arguments(world: World) -> None:
    p, q = parameter(3), parameter(2)

    def wrap(*args: Any, **options: Any) -> Any:
        return hvd.DistributedOptimizer(sgd([p, q]), *args, **options)

    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: wrap([("p", p), ("p", q)]), "names stand for several parameters: p"),
        (lambda: wrap([("p", p)]), "number 1 of the optimizer have no name"),
        (lambda: wrap({"p": p, "q": q}), "pairs"),
        (lambda: wrap([p, q]), "pairs"),
        (lambda: wrap(op=hvd.Min), "Average, Sum or Adasum, not by Min"),
        (lambda: wrap(op=hvd.Product), "Average, Sum or Adasum, not by Product"),
        (lambda: wrap(op=7), "op 7 is none of"),
        (lambda: wrap(op=hvd.Sum, gradient_predivide_factor=2.0), "op=Average only"),
        (lambda: wrap(groups=-1), "groups=-1 is negative"),
        (lambda: wrap(groups=[[p], [p]]), "distinct parameters"),
        (lambda: wrap(groups=[[parameter(3)]]), "parameters of the optimizer"),
        (lambda: wrap(gradient_predivide_factor=0.0), "gradient_predivide_factor"),
        (lambda: wrap(backward_passes_per_step=0), "backward_passes_per_step is a positive integer, not 0"),
        (lambda: wrap(compression="fp16"), "compression"),
        (lambda: hvd.DistributedOptimizer(torch.nn.Linear(2, 2)), "expected a torch.optim.Optimizer, got Linear"),
        (lambda: hvd.DistributedOptimizer(wrap()), "already"),
    ]
    for call, message in wrong:
        with pytest.raises(collective.InvalidArgumentError, match=message):
            call()
    # Nothing of that has left a mark.
    twins = Twins(world, Layers())
    twins.train([lambda model, rank: model.loss(rank)] * 2)
    twins.check()
    optimizer = wrap([("q", q), ("p", p), ("unused", parameter(1))])
    (p * values(3, world.rank)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(p.grad, sum(values(3, r) for r in range(world.size)) / world.size)
