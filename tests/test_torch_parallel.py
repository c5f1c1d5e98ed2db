"""What is built on torch.distributed equals one process, in float64, on the backend "collective".

Each rank trains a twin by itself, on the losses of all ranks.
"""

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import collective.torch  # noqa: F401  # makes the backend known
from harness.plugin import World
from training import Layers, assert_same_on_all_ranks, values

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
    pytest.skip(f"FSDP2 needs torch 2.6, not {torch.__version__}", allow_module_level=True)

import torch.distributed._functional_collectives as funcol
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

Loss = Callable[[Any, int, int], Tensor]  # of (model, rank, step)


@pytest.fixture(autouse=True)
def group(world: World) -> Iterator[None]:
    """The default process group."""
    dist.init_process_group("collective")
    yield
    dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(whole(result).detach(), whole(expected).detach(), rtol=1e-9, atol=1e-9)


def same_parameters(model: nn.Module, alone: nn.Module) -> None:
    """And their gradients."""
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        close(p, q)
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            close(p.grad, q.grad)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def loss_of(net: nn.Module, rank: int, step: int, **how: Any) -> Tensor:
    """On data of this rank and step."""
    x, y = (values((4, 5), rank, 1000 + 2 * step + i) for i in range(2))
    return (net(x, **how) - y).square().mean()


def train(
    world: World,
    model: Any,
    alone: Any,
    make: Callable[[Any], torch.optim.Optimizer] = sgd,
    loss: Loss = loss_of,
    steps: int = 4,
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """The model on this rank's losses, and its twin on all ranks'; compared after each step."""
    optimizer, other = make(model), make(alone)
    for step in range(steps):
        for each in (optimizer, other):
            each.zero_grad()
        loss(model, world.rank, step).backward()  # type: ignore[no-untyped-call]
        torch.stack([loss(alone, rank, step) for rank in range(world.size)]).mean().backward()
        for each in (optimizer, other):
            each.step()
        same_parameters(model, alone)
    return optimizer, other


# ---- DistributedDataParallel ----


@pytest.mark.ranks(2, 3, 4)
def test_ddp(world: World) -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"static_graph": True},
        {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0001},
        {"find_unused_parameters": True},
        {"find_unused_parameters": True, "bucket_cap_mb": 0.0001},
    ]
    for way in ways:
        alone = Layers()
        model = copy.deepcopy(alone)
        if world.rank > 0:
            for p in model.parameters():
                p.data.zero_()  # rank 0's count
        loss: Loss = loss_of
        if "find_unused_parameters" in way:
            loss = partial(chosen_layers, size=world.size)
        train(world, DistributedDataParallel(model, **way), alone, loss=loss)
        assert_same_on_all_ranks(world, model.parameters())


def chosen_layers(net: nn.Module, rank: int, step: int, size: int) -> Tensor:
    """Ranks leave out different layers, and in the second step all leave out the first."""
    layers = [number for number in range(3) if number != (0 if step == 1 else (rank + step) % 3)]
    return loss_of(net, rank, step, which=layers)


@pytest.mark.ranks(2, 3)
def test_ddp_accumulates_without_sync(world: World) -> None:
    alone = Layers()
    model = DistributedDataParallel(copy.deepcopy(alone))

    def passes(net: nn.Module, rank: int, step: int) -> Tensor:
        if net is model:
            with model.no_sync():
                loss_of(net, rank, step).backward()  # type: ignore[no-untyped-call]
            return loss_of(net, rank, step + 100)
        return loss_of(net, rank, step) + loss_of(net, rank, step + 100)

    train(world, model, alone, loss=passes)


def bf16_hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """torch's, by another name: under its own DDP takes it with NCCL alone."""
    return default_hooks.bf16_compress_hook(state, bucket)


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("hook", [default_hooks.allreduce_hook, default_hooks.fp16_compress_hook, bf16_hook])
def test_ddp_comm_hook(world: World, hook: Any) -> None:
    """Gradients are integers, times size, that bfloat16 holds: nothing is lost on the wire."""
    alone = nn.Linear(6, 3, dtype=torch.float64)
    model = DistributedDataParallel(copy.deepcopy(alone))
    model.register_comm_hook(None, hook)
    with torch.no_grad():
        for p in alone.parameters():
            dist.broadcast(p, src=0)

    def loss(net: nn.Module, rank: int, step: int) -> Tensor:
        return (net(8 * values((2, 6), rank, step)) * values((2, 3), 17).sign()).sum() * world.size

    train(world, model, alone, loss=loss)


@pytest.mark.ranks(2, 3)
def test_ddp_compresses_by_powersgd(world: World) -> None:
    """Of full rank, and so without loss. Its callbacks wait for operations of their own."""
    alone = Layers()
    model = DistributedDataParallel(copy.deepcopy(alone))
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=5, start_powerSGD_iter=2, min_compression_rate=0.3, use_error_feedback=False
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    train(world, model, alone, steps=5)
    assert state.total_numel_after_compression > 0


@pytest.mark.ranks(2, 3)
def test_callbacks_wait_for_other_operations(world: World) -> None:
    for _ in range(20):
        one, other = torch.ones(3), torch.ones(5)

        def then(_: Any, other: Tensor = other) -> Any:
            return dist.all_reduce(other, async_op=True).get_future().wait()

        dist.all_reduce(one, async_op=True).get_future().then(then).wait()
        assert one.tolist() == [world.size] * 3
        assert other.tolist() == [world.size] * 5


@pytest.mark.ranks(2, 3)
def test_ddp_joins_uneven_inputs(world: World) -> None:
    alone = Layers()
    model = DistributedDataParallel(copy.deepcopy(alone))
    optimizer, other = sgd(model), sgd(alone)
    with Join([model], divide_by_initial_world_size=True):  # type: ignore[list-item]
        for step in range(2 + world.rank):
            optimizer.zero_grad()
            loss_of(model, world.rank, step).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for step in range(1 + world.size):
        other.zero_grad()
        losses = [loss_of(alone, rank, step) for rank in range(world.size) if step < 2 + rank]
        (torch.stack(losses).sum() / world.size).backward()  # type: ignore[no-untyped-call]
        other.step()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        close(p, q)


@pytest.mark.ranks(2)
@pytest.mark.limit(150)
def test_ddp_is_compiled(world: World) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    alone = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    for salt, p in enumerate(alone.parameters()):
        p.data = values(tuple(p.shape), 17, salt) / 2
    compiled: Any = torch.compile(DistributedDataParallel(copy.deepcopy(alone)))
    train(world, compiled, alone, steps=2)


@pytest.mark.ranks(2, 3, 4)
def test_zero_redundancy_optimizer(world: World) -> None:
    alone = Layers()
    model = DistributedDataParallel(copy.deepcopy(alone))

    def make(net: nn.Module) -> torch.optim.Optimizer:
        if net is alone:
            return adam(net)
        return ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=0.01)

    optimizer, other = train(world, model, alone, make)
    optimizer.consolidate_state_dict(to=world.size - 1)  # type: ignore[attr-defined]
    if world.rank == world.size - 1:
        gathered, expected = optimizer.state_dict()["state"], other.state_dict()["state"]
        assert gathered.keys() == expected.keys()
        for number, state in expected.items():
            close(gathered[number]["exp_avg"], state["exp_avg"])


# ---- DeviceMesh, DTensor ----


@pytest.mark.ranks(4)
def test_mesh_has_groups_by_dimension(world: World) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    row, column = divmod(world.rank, 2)
    assert (mesh.get_local_rank("rows"), mesh.get_local_rank("columns")) == (row, column)
    for name, members in {"rows": [column, 2 + column], "columns": [2 * row, 2 * row + 1]}.items():
        assert dist.get_process_group_ranks(mesh.get_group(name)) == members
        assert mesh[name].mesh.tolist() == members
        total = torch.tensor([10.0**world.rank])
        dist.all_reduce(total, group=mesh.get_group(name))
        assert total.item() == sum(10.0**rank for rank in members)
    pair = dist.new_group([1, 3])  # all ranks call it
    if world.rank in (1, 3):
        total = torch.ones(3) * world.rank
        dist.all_reduce(total, group=pair)
        assert total.tolist() == [4.0] * 3


PLACEMENTS: list[Placement] = [Shard(0), Shard(1), Replicate()]


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("shape", [(12, 24), (7, 5), (1, 3), (2, 1)], ids=str)
def test_dtensor_redistributes(world: World, shape: tuple[int, int]) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    x = values(shape, 17)
    for before in PLACEMENTS:
        tensor = distribute_tensor(x, mesh, [before])
        for after in PLACEMENTS:
            moved = tensor.redistribute(mesh, [after])
            assert moved.placements == (after,)
            close(moved, x)
    mine = values(shape, world.rank)
    total = torch.stack([values(shape, rank) for rank in range(world.size)]).sum(0)
    for after in PLACEMENTS:
        close(DTensor.from_local(mine, mesh, [Partial()]).redistribute(mesh, [after]), total)


@pytest.mark.ranks(4)
def test_dtensor_on_two_dimensions(world: World) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    x = values((7, 5), 17)
    for first in PLACEMENTS:
        for second in PLACEMENTS:
            tensor = distribute_tensor(x, mesh, [first, second])
            close(tensor, x)
            close(tensor.redistribute(mesh, [second, first]), x)


@pytest.mark.ranks(2, 3)
def test_dtensor_computes_with_gradients(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    a, b = values((7, 6), 17), values((6, 5), 18)
    for left in PLACEMENTS:
        for right in PLACEMENTS:
            one, two = a.clone().requires_grad_(), b.clone().requires_grad_()
            (one @ two).sin().sum().backward()  # type: ignore[no-untyped-call]
            x = distribute_tensor(a, mesh, [left]).requires_grad_()
            y = distribute_tensor(b, mesh, [right]).requires_grad_()
            product = (x @ y).redistribute(mesh, [Replicate()])
            product.sin().sum().backward()  # type: ignore[no-untyped-call]
            close(product, one @ two)
            for part, expected in ((x, one), (y, two)):
                assert part.grad is not None
                assert expected.grad is not None
                close(part.grad, expected.grad)


# ---- FSDP2, tensor parallelism, pipelines ----


def shard(model: Layers, mesh: DeviceMesh, **how: Any) -> Layers:
    for layer in model:
        fully_shard(layer, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
def test_fsdp(world: World, reshard: bool) -> None:
    alone = Layers()  # 5 x 5: no number of ranks here divides it
    model = shard(copy.deepcopy(alone), init_device_mesh("cpu", (world.size,)), reshard_after_forward=reshard)
    train(world, model, alone, adam)
    assert any(p.to_local().numel() < p.numel() for p in model.parameters() if isinstance(p, DTensor))


@pytest.mark.ranks(2)
def test_fsdp_accumulates_clips_and_casts(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    alone = Layers()
    model = shard(copy.deepcopy(alone), mesh)
    optimizer, other = sgd(model), sgd(alone)
    for last in (False, True):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        loss_of(model, world.rank, int(last)).backward()  # type: ignore[no-untyped-call]
        losses = [loss_of(alone, rank, int(last)) for rank in range(world.size)]
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
    norms = [nn.utils.clip_grad_norm_(net.parameters(), max_norm=0.01) for net in (model, alone)]
    close(*norms)
    optimizer.step()
    other.step()
    same_parameters(model, alone)

    single = Layers(dtype=torch.float32)
    cast = shard(copy.deepcopy(single), mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    x = values((4, 5), 3, dtype=torch.float32)
    torch.testing.assert_close(cast(x).float(), single(x), rtol=0.05, atol=0.05)


@pytest.mark.ranks(2)
def test_fsdp_is_compiled(world: World) -> None:
    alone = Layers()
    model = shard(copy.deepcopy(alone), init_device_mesh("cpu", (world.size,)))
    model.compile(backend="aot_eager")
    train(world, model, alone, steps=3)


@pytest.mark.ranks(4)
def test_hybrid_sharding(world: World) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    alone = Layers()
    train(world, shard(copy.deepcopy(alone), mesh), alone, adam)


class MLP(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, hidden), nn.Linear(hidden, 6)
        for salt, p in enumerate(self.parameters()):
            p.data = values(tuple(p.shape), 17, salt) / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


@pytest.mark.ranks(2, 3, 4)
def test_tensor_parallel(world: World) -> None:
    plans: list[tuple[int, dict[str, Any]]] = [
        (12, {"up": ColwiseParallel(), "down": RowwiseParallel()}),
        (7, {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}),
        (
            12,
            {
                "norm": SequenceParallel(sequence_dim=0, use_local_output=False),
                "up": ColwiseParallel(input_layouts=Shard(0)),
                "down": RowwiseParallel(output_layouts=Replicate()),
            },
        ),
    ]
    mesh = init_device_mesh("cpu", (world.size,))
    for hidden, plan in plans:
        alone = MLP(hidden)
        model = parallelize_module(copy.deepcopy(alone), mesh, plan)
        train(world, model, alone, loss=lambda net, rank, step: net(values((12, 6), 0, step)).square().mean())


@pytest.mark.ranks(4)
def test_fsdp_of_tensor_parallel(world: World) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    alone = MLP(12)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(copy.deepcopy(alone), mesh["model"], plan)
    fully_shard(model, mesh=mesh["data"])
    train(world, model, alone, loss=lambda net, rank, step: net(values((4, 6), rank // 2, step)).square().mean())


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("kind", [ScheduleGPipe, Schedule1F1B, ScheduleInterleaved1F1B])
def test_pipeline(world: World, kind: Any) -> None:
    each = 2 if kind is ScheduleInterleaved1F1B else 1
    count = each * world.size
    layers = Layers(depth=count)
    alone = nn.Sequential(*layers)
    parts = [copy.deepcopy(layers[world.rank + n * world.size]) for n in range(each)]
    numbers = [world.rank + n * world.size for n in range(each)]
    stages = [PipelineStage(part, n, count, torch.device("cpu")) for part, n in zip(parts, numbers, strict=True)]
    squares = nn.MSELoss()
    schedule = kind(stages if each > 1 else stages[0], 2 * world.size, loss_fn=squares)
    for step in range(2):
        x, y = (values((4 * world.size, 5), 17, 10 * step + i) for i in range(2))
        for net in (*parts, alone):
            net.zero_grad()
        losses: list[Tensor] = []
        last = world.rank == world.size - 1
        schedule.step(*([x] if world.rank == 0 else []), target=y if last else None, losses=losses)
        expected = squares(alone(x), y)
        expected.backward()
        if last:
            close(torch.stack(losses).mean(), expected)
        for part, number in zip(parts, numbers, strict=True):
            same_parameters(part, alone[number])


# ---- functional collectives, checkpoints ----


@pytest.mark.ranks(2, 3, 4)
def test_functional_collectives(world: World) -> None:
    rank, size = world.rank, world.size
    every = [values((2 * size, 3), r) for r in range(size)]
    mine, ranks = every[rank], list(range(size))
    total = torch.stack(every).sum(0)
    everywhere: Any = dist.group.WORLD
    close(funcol.all_reduce(mine, "sum", everywhere), total)
    close(funcol.all_reduce(mine, "avg", everywhere), total / size)
    close(funcol.all_reduce(mine, "max", ranks), torch.stack(every).amax(0))
    close(funcol.all_gather_tensor(mine, 0, everywhere), torch.cat(every))
    close(funcol.all_gather_tensor(mine, 1, everywhere), torch.cat(every, 1))
    close(funcol.reduce_scatter_tensor(mine, "sum", 0, everywhere), total.chunk(size)[rank])
    close(funcol.broadcast(mine, size - 1, everywhere), every[-1])
    for result, scale in zip(funcol.all_reduce_coalesced([mine, 2 * mine], "sum", everywhere), (1, 2), strict=True):
        close(result, scale * total)
    for result, scale in zip(
        funcol.all_gather_into_tensor_coalesced([mine, 2 * mine], everywhere), (1, 2), strict=True
    ):
        close(result, scale * torch.cat(every))
    both = funcol.reduce_scatter_tensor_coalesced([mine, 2 * mine], "sum", [0, 0], everywhere)
    for result, scale in zip(both, (1, 2), strict=True):
        close(result, scale * total.chunk(size)[rank])
    shifted = funcol.permute_tensor(mine.flatten(), [(r + 1) % size for r in ranks], everywhere)
    close(shifted, every[rank - 1].flatten())

    # Rank r sends s + 1 rows to rank s, so that it gets rank + 1 rows from each.
    rows = sum(range(1, size + 1))
    sent, received = [r + 1 for r in ranks], [rank + 1] * size
    x = values((rows, 2), rank).requires_grad_()
    y = funcol.all_to_all_single_autograd(x, received, sent, everywhere)
    start = sum(range(1, rank + 1))
    close(y, torch.cat([values((rows, 2), r)[start : start + rank + 1] for r in ranks]))
    (y * (rank + 1)).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    close(x.grad, torch.cat([torch.full((r + 1, 2), r + 1.0, dtype=torch.float64) for r in ranks]))

    x = mine.clone().requires_grad_()
    weights = values((2 * size * size, 3), 18)
    (funcol.all_gather_tensor_autograd(x, 0, everywhere) * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    close(x.grad, size * weights.chunk(size)[rank])


@pytest.mark.ranks(2, 3)
def test_functional_collectives_are_traced(world: World) -> None:
    """As graphs; what a compiler makes of them is its own affair."""

    def both(x: Tensor) -> Tensor:
        total = funcol.all_reduce(x * 2, "sum", dist.group.WORLD)  # type: ignore[arg-type]
        return funcol.all_gather_tensor(total + 1, 0, dist.group.WORLD)  # type: ignore[arg-type]

    every = [values((3, 2), rank) for rank in range(world.size)]
    expected = torch.cat([2 * torch.stack(every).sum(0) + 1] * world.size)
    compiled: Any = torch.compile(both, backend="aot_eager", fullgraph=True)
    close(compiled(every[world.rank]), expected)

    def in_place(x: Tensor) -> Tensor:
        total = x * 2
        dist.all_reduce(total)
        return total + 1

    compiled = torch.compile(in_place, backend="aot_eager", fullgraph=True)
    close(compiled(every[world.rank]), 2 * torch.stack(every).sum(0) + 1)


@pytest.mark.ranks(2, 3, 4)
def test_checkpoint(world: World, tmp_path: Path) -> None:
    directory = world.comm.bcast(tmp_path) / "checkpoint"
    mesh = init_device_mesh("cpu", (world.size,))
    alone = Layers()
    model = shard(copy.deepcopy(alone), mesh)
    optimizer, other = train(world, model, alone, adam, steps=2)
    parts, states = get_state_dict(model, optimizer)
    dcp.save({"model": parts, "optimizer": states, "step": 2}, checkpoint_id=directory)
    later = shard(Layers(), mesh)
    restored = adam(later)
    parts, states = get_state_dict(later, restored)
    saved: dict[str, Any] = {"model": parts, "optimizer": states, "step": 0}
    dcp.load(saved, checkpoint_id=directory)
    set_state_dict(later, restored, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    assert saved["step"] == 2
    train(world, later, alone, lambda net: restored if net is later else other, steps=2)

    x = values((7, 5), 17)
    dcp.save({"x": distribute_tensor(x, mesh, [Shard(0)])}, checkpoint_id=directory / "other")
    for placement in PLACEMENTS:  # each rank reads another part than it wrote
        empty = {"x": distribute_tensor(torch.zeros_like(x), mesh, [placement])}
        dcp.load(empty, checkpoint_id=directory / "other")
        close(empty["x"], x)
    dist.barrier()  # nobody removes the directory yet


@pytest.mark.ranks(2)
def test_checkpoint_in_the_background(world: World, tmp_path: Path) -> None:
    directory = world.comm.bcast(tmp_path) / "checkpoint"
    mesh = init_device_mesh("cpu", (world.size,))
    x = values((7, 5), 17)
    writer = dist.new_group()  # the thread's own: calls of one group have one order
    saving = dcp.async_save(
        {"x": distribute_tensor(x, mesh, [Shard(0)])}, checkpoint_id=directory, process_group=writer
    )
    total = torch.ones(5)
    for _ in range(20):
        dist.all_reduce(total, dist.ReduceOp.AVG)
    with contextlib.suppress(AttributeError):
        saving.result(timeout=40)  # type: ignore[union-attr]
    empty = {"x": distribute_tensor(torch.zeros_like(x), mesh, [Shard(1)])}
    dcp.load(empty, checkpoint_id=directory)
    close(empty["x"], x)
    dist.barrier()
