"""The collective operations on tensors under Horovod's names, and their gradients."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import collective
import collective.torch as hvd
from harness.plugin import World
from training import values

none, everybody = hvd.Compression.none, hvd.global_process_set


def plain_allreduce(
    tensor, average=None, name=None, op=None, prescale_factor=1.0, postscale_factor=1.0, process_set=everybody
): ...


def compressed_allreduce(
    tensor,
    average=None,
    name=None,
    compression=none,
    op=None,
    prescale_factor=1.0,
    postscale_factor=1.0,
    process_set=everybody,
): ...


def plain_reducescatter(tensor, name=None, op=0, process_set=everybody, prescale_factor=1.0, postscale_factor=1.0): ...


def compressed_reducescatter(
    tensor, name=None, compression=none, op=0, process_set=everybody, prescale_factor=1.0, postscale_factor=1.0
): ...


def optimizer(
    optimizer,
    named_parameters=None,
    compression=none,
    backward_passes_per_step=1,
    op=0,
    gradient_predivide_factor=1.0,
    num_groups=0,
    groups=None,
    sparse_as_dense=False,
    process_set=everybody,
): ...


# Arguments in Horovod's order, with its defaults; those of `grouped_` forms start with `tensors`.
HOROVOD: dict[str, Callable[..., Any]] = {
    "allreduce": compressed_allreduce,
    "allreduce_ allreduce_async allreduce_async_": plain_allreduce,
    "grouped_allreduce": compressed_allreduce,
    "grouped_allreduce_ grouped_allreduce_async grouped_allreduce_async_": plain_allreduce,
    "sparse_allreduce_async": lambda tensor, name, op, process_set=everybody: ...,
    "allgather allgather_async": lambda tensor, name=None, process_set=everybody: ...,
    "grouped_allgather grouped_allgather_async": lambda tensor, name=None, process_set=everybody: ...,
    "broadcast broadcast_": lambda tensor, root_rank, name=None, process_set=everybody: ...,
    "broadcast_async broadcast_async_": lambda tensor, root_rank, name=None, process_set=everybody: ...,
    "alltoall alltoall_async": lambda tensor, splits=None, name=None, process_set=everybody: ...,
    "reducescatter grouped_reducescatter": compressed_reducescatter,
    "reducescatter_async grouped_reducescatter_async": plain_reducescatter,
    "poll synchronize": lambda handle: ...,
    "join": lambda device=-1: ...,
    "barrier": lambda process_set=everybody: ...,
    "broadcast_parameters": lambda params, root_rank: ...,
    "broadcast_optimizer_state": lambda optimizer, root_rank: ...,
    "broadcast_object": lambda obj, root_rank=0, name=None, process_set=everybody: ...,
    "allgather_object": lambda obj, name=None: ...,
    "DistributedOptimizer": optimizer,
}
OTHERS = """
init shutdown is_initialized rank size local_rank local_size cross_rank cross_size is_homogeneous Average Sum Adasum Min
Max Product Compression HorovodInternalError ProcessSet global_process_set add_process_set remove_process_set
SyncBatchNorm mpi_threads_supported mpi_enabled mpi_built gloo_enabled gloo_built nccl_built ddl_built ccl_built
cuda_built rocm_built
"""


def test_names_and_arguments_are_horovods() -> None:
    for names, model in HOROVOD.items():
        expected = list(inspect.signature(model).parameters.values())
        for name in names.split():
            ours = list(inspect.signature(getattr(hvd, name)).parameters.values())
            for own, theirs in zip(ours, expected, strict=False):
                assert own.name == theirs.name + "s" * (name.startswith("grouped_") and theirs.name == "tensor"), name
                if theirs.default is not inspect.Parameter.empty:
                    assert own.default == theirs.default, name
            assert len(ours) >= len(expected), name
            for extra in ours[len(expected) :]:
                assert extra.default is not inspect.Parameter.empty, name
            assert name in hvd.__all__
    assert set(OTHERS.split()) <= set(hvd.__all__)
    assert [hvd.Average, hvd.Sum, hvd.Adasum, hvd.Min, hvd.Max, hvd.Product] == [0, 1, 2, 3, 4, 5]
    assert issubclass(hvd.HorovodInternalError, RuntimeError)
    assert len(hvd.__all__) == len(set(hvd.__all__))
    assert all(hasattr(hvd, name) for name in hvd.__all__)


@pytest.mark.ranks(1, 2, 3)
def test_average_and_op(world: World) -> None:
    mine = values((3, 2), world.rank)
    total = sum(values((3, 2), rank) for rank in range(world.size))
    ways: list[tuple[dict[str, Any], Any]] = [
        ({}, total / world.size),
        ({"average": True}, total / world.size),
        ({"average": False}, total),
        ({"op": hvd.Average}, total / world.size),
        ({"op": 1}, total),
        ({"op": hvd.Sum, "prescale_factor": 0.5, "postscale_factor": 4.0}, total * 2),
        ({"op": hvd.Max}, torch.stack([values((3, 2), rank) for rank in range(world.size)]).amax(0)),
    ]
    for options, expected in ways:
        given = mine.clone()
        results = [
            hvd.allreduce(given, **options),
            hvd.synchronize(hvd.allreduce_async(given, **options)),
            hvd.allreduce_(mine.clone(), **options),
            hvd.synchronize(hvd.allreduce_async_(mine.clone(), **options)),
        ]
        assert torch.equal(given, mine)
        for result in results:
            torch.testing.assert_close(result, expected, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(
        hvd.allreduce(mine, None, "by position", hvd.Compression.none, hvd.Sum, 2.0, 0.5), total, rtol=1e-15, atol=1e-15
    )
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: hvd.allreduce(mine, average=True, op=hvd.Sum), "both given"),
        (lambda: hvd.allreduce(mine, op=7), "op 7 is none of Average, Sum"),
        (lambda: hvd.allreduce_(mine.t()), "in place needs a contiguous"),
        (lambda: hvd.broadcast(mine, world.size), f"root_rank {world.size} "),
    ]
    for call, message in wrong:
        with pytest.raises(collective.InvalidArgumentError, match=message):
            call()


@pytest.mark.ranks(1, 2, 3)
def test_handles(world: World) -> None:
    handles: dict[str, Any] = {}
    for number in range(5) if world.rank else reversed(range(5)):  # by name, so in any order
        handles[f"sum {number}"] = hvd.allreduce_async(
            torch.tensor([number + world.rank]), name=f"sum {number}", op=hvd.Sum
        )
        handles[f"rows {number}"] = hvd.allgather_async(torch.full((world.rank, 2), number), name=f"rows {number}")
        handles[f"root {number}"] = hvd.broadcast_async(torch.tensor(world.rank + number), 0, name=f"root {number}")
    ranks = range(world.size)
    for number in range(5):
        total, rows, root = (handles[f"{what} {number}"] for what in ("sum", "rows", "root"))
        assert hvd.synchronize(total).tolist() == [sum(number + rank for rank in ranks)]
        assert hvd.poll(total) is True
        assert hvd.synchronize(total) is hvd.synchronize(total)
        assert torch.equal(hvd.synchronize(rows), torch.full((sum(ranks), 2), number))
        assert hvd.synchronize(root).item() == number
    if world.rank == 0:
        late = hvd.allreduce_async(torch.ones(2), name="late")
        assert [hvd.poll(late) for _ in range(100)] == [world.size == 1] * 100 or world.size == 1
    world.comm.Barrier()
    if world.rank:
        late = hvd.allreduce_async(torch.ones(2), name="late")
    assert torch.equal(hvd.synchronize(late), torch.ones(2))
    hvd.barrier()


Verb = Callable[[torch.Tensor, int], torch.Tensor]  # of this rank's tensor

# Operation, the same in one process (of all ranks' tensors), rows of a rank's tensor, and whether gradients are means
# over the ranks where the operation's adjoint has a sum (see autograd.py).
DIFFERENTIABLE: list[
    tuple[Callable[[torch.Tensor], Any], Callable[[list[torch.Tensor]], Any], Callable[[int], int], bool]
] = [
    (lambda x: hvd.allreduce(x), lambda xs: sum(xs) / len(xs), lambda rank: 3, False),
    (lambda x: hvd.allreduce(x, op=hvd.Sum), lambda xs: sum(xs), lambda rank: 3, False),
    (
        lambda x: hvd.allreduce(x, op=hvd.Sum, prescale_factor=0.5, postscale_factor=3.0),
        lambda xs: sum(xs) * 1.5,
        lambda rank: 3,
        False,
    ),
    (lambda x: hvd.allreduce(x.t()), lambda xs: sum(x.t() for x in xs) / len(xs), lambda rank: 2, False),
    (lambda x: hvd.allgather(x), lambda xs: torch.cat(xs), lambda rank: 2, True),
    (lambda x: hvd.allgather(x), lambda xs: torch.cat(xs), lambda rank: (rank + 2) % 3, True),  # also none
    (lambda x: hvd.allgather(x[0, 0]), lambda xs: torch.stack([x[0, 0] for x in xs]), lambda rank: 1, True),
    (
        lambda x: torch.cat(hvd.grouped_allreduce([x, x * x], op=hvd.Sum)),
        lambda xs: torch.cat([sum(xs), sum(x * x for x in xs)]),
        lambda rank: 2,
        False,
    ),
    (
        lambda x: torch.cat(hvd.grouped_allgather([x, x[:1] * 2])),
        lambda xs: torch.cat([*xs, *(x[:1] * 2 for x in xs)]),
        lambda rank: rank + 1,
        True,
    ),
    (lambda x: hvd.broadcast(x, 0), lambda xs: xs[0], lambda rank: 3, True),
    (lambda x: hvd.broadcast(x, hvd.size() - 1), lambda xs: xs[-1], lambda rank: 3, True),
]


def losses_of(result: torch.Tensor, rank: int) -> torch.Tensor:
    """A loss that differs by rank, and is not linear, so that its second derivative shows as well."""
    weights = values(result.shape, rank, 5)
    return (result**3 * weights).sum()


@pytest.mark.ranks(1, 2, 3)
def test_gradients(world: World) -> None:
    """Those of the sum of all ranks' losses, as one process has them; or of their mean."""
    for distributed, alone, rows, is_averaged in DIFFERENTIABLE:
        xs = [values((rows(rank), 2), rank, 3).requires_grad_() for rank in range(world.size)]
        sum(losses_of(alone(xs), rank) for rank in range(world.size)).backward()  # type: ignore[union-attr]
        x = values((rows(world.rank), 2), world.rank, 3).requires_grad_()
        losses_of(distributed(x), world.rank).backward()
        expected = torch.zeros_like(x) if xs[world.rank].grad is None else xs[world.rank].grad
        if is_averaged:
            expected /= world.size
        torch.testing.assert_close(x.grad, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.ranks(1, 2, 3)
def test_gradients_of_gradients(world: World) -> None:
    """As gradient penalties need them: the operations in backward are differentiable themselves."""
    for distributed, alone, rows, is_averaged in DIFFERENTIABLE:
        xs = [values((rows(rank), 2), rank, 3).requires_grad_() for rank in range(world.size)]
        total = sum(losses_of(alone(xs), rank) for rank in range(world.size))
        first = torch.autograd.grad(total, xs, create_graph=True, allow_unused=True)  # type: ignore[arg-type]
        penalty = sum(g.square().sum() for g in first if g is not None)
        expected = torch.autograd.grad(penalty, xs, allow_unused=True)[world.rank]  # type: ignore[arg-type]
        x = values((rows(world.rank), 2), world.rank, 3).requires_grad_()
        (g,) = torch.autograd.grad(losses_of(distributed(x), world.rank), x, create_graph=True)
        (second,) = torch.autograd.grad(g.square().sum(), x)
        if expected is None:
            expected = torch.zeros_like(x)
        if is_averaged:  # twice in the square of the first gradient, and once more on the way back
            expected = expected / world.size**3
        torch.testing.assert_close(second, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.ranks(2)
def test_where_there_is_no_gradient(world: World) -> None:
    x = values(3, world.rank).requires_grad_()
    for op in (hvd.Min, hvd.Max, hvd.Product):
        with pytest.raises(NotImplementedError, match=f"op {op.name} has no gradient"):
            hvd.allreduce(x, op=op).sum().backward()
    for result in (
        hvd.synchronize(hvd.allreduce_async(x)),
        hvd.synchronize(hvd.allgather_async(x)),
        hvd.synchronize(hvd.broadcast_async(x, 1)),
        hvd.allreduce(x.detach()),
    ):
        assert not result.requires_grad
    with torch.no_grad():
        assert not hvd.allreduce(x).requires_grad
