"""Equal states at the start: from one rank to all."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import collective
import collective.torch as hvd
from harness.plugin import World
from training import Layers, assert_same_on_all_ranks, bits, parameter, values


class Everything(torch.nn.Module):
    """Parameters and buffers of many dtypes and layouts, all of them different on each rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.conv = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.transposed = torch.nn.Parameter(torch.empty(4, 6).t())
        self.gaps = torch.nn.Parameter(torch.empty(5, 8)[:, ::2])
        self.frozen = torch.nn.Parameter(torch.empty(3), requires_grad=False)
        self.nothing = torch.nn.Parameter(torch.empty(0, 3))
        for dtype in (torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.complex64):
            self.register_buffer(f"of {str(dtype)[6:]}", torch.empty(3, 2, dtype=dtype))
        self.register_buffer("strided", torch.empty(4, 4, dtype=torch.int32).t()[1:, ::2])
        with torch.no_grad():
            for salt, tensor in enumerate(self.state_dict().values()):
                tensor.copy_(values(tensor.shape, rank, salt) * 8)


def all_bits(tensors: Iterator[torch.Tensor] | Any) -> list[bytes]:
    return [bits(tensor) for tensor in tensors]


@pytest.mark.ranks(1, 2, 3)
def test_broadcast_parameters(world: World) -> None:
    ways: list[Callable[[Everything], Any]] = [
        lambda model: model.state_dict(),
        lambda model: dict(reversed(model.state_dict().items())),
        lambda model: {**model.state_dict(), "epoch": 3, "extra": None},
        lambda model: [*model.named_parameters(), *model.named_buffers()],
        lambda model: [*model.parameters(), *model.buffers()],
    ]
    for root in range(world.size):
        for way in ways:
            model, expected = Everything(world.rank), Everything(root)
            strides = [tensor.stride() for tensor in model.state_dict().values()]
            addresses = [tensor.data_ptr() for tensor in model.state_dict().values()]
            hvd.broadcast_parameters(way(model), root_rank=root)
            assert all_bits(model.state_dict().values()) == all_bits(expected.state_dict().values())
            assert strides == [tensor.stride() for tensor in model.state_dict().values()]
            assert addresses == [tensor.data_ptr() for tensor in model.state_dict().values()]
    model = Everything(world.rank)
    hvd.broadcast_parameters(model.parameters())
    hvd.broadcast_parameters(model.named_buffers(), world.size - 1)  # type: ignore[arg-type]
    assert all_bits(model.parameters()) == all_bits(Everything(0).parameters())
    assert all_bits(model.buffers()) == all_bits(Everything(world.size - 1).buffers())
    hvd.broadcast_parameters({})
    hvd.broadcast_parameters(iter(()))


@pytest.mark.ranks(2, 3)
def test_wrong_parameters(world: World) -> None:
    """Told on every rank; and the next call is as good as ever, also at once."""
    for wrong in (torch.ones(3), 3, None):
        with pytest.raises(collective.InvalidArgumentError, match="state_dict or parameters"):
            hvd.broadcast_parameters(wrong)  # type: ignore[arg-type]
    with pytest.raises(collective.InvalidArgumentError, match=f"root_rank {world.size} "):
        hvd.broadcast_parameters([torch.ones(3)], root_rank=world.size)
    for attempt in range(20):
        tensors = [values(50, world.rank, salt) for salt in range(100)]
        tensors[attempt] = values(50 + (world.rank == 1), world.rank)
        message = rf"broadcast_parameters\.{attempt}'.*\(50,\) on ranks? 0.*\(51,\) on rank 1"
        with pytest.raises(collective.MismatchError, match=message):
            hvd.broadcast_parameters(tensors)
    tensors = [values(50, world.rank, salt) for salt in range(100)]
    hvd.broadcast_parameters(tensors, root_rank=1)
    assert all_bits(tensors) == all_bits(values(50, 1, salt) for salt in range(100))


Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: list[Make] = [
    partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    partial(torch.optim.SGD, lr=0.1),  # has no state at all
    partial(torch.optim.Adam, lr=0.01),
    partial(torch.optim.AdamW, lr=torch.tensor(0.01), amsgrad=True),
    partial(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.5),
    partial(torch.optim.Rprop),
    partial(torch.optim.RMSprop, centered=True, momentum=0.5),
    partial(torch.optim.LBFGS, lr=0.5, max_iter=3, history_size=4),
    partial(torch.optim.LBFGS, max_iter=4, line_search_fn="strong_wolfe"),
    lambda parameters: torch.optim.Adam([{"params": parameters[:2], "lr": 0.5}, {"params": parameters[2:]}]),
    lambda parameters: hvd.DistributedOptimizer(torch.optim.Adam(parameters)),
]
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS.append(lambda parameters: torch.optim.Muon([p for p in parameters if p.dim() == 2]))


def flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """A state as pairs of path and content, tensors as their bits."""
    if isinstance(value, torch.Tensor):
        return [(path, (value.dtype, tuple(value.shape), value.stride(), bits(value)))]
    if isinstance(value, dict):
        return [pair for key in sorted(value, key=str) for pair in flat(value[key], f"{path}.{key}")]
    if isinstance(value, (list, tuple)):
        return [pair for number, item in enumerate(value) for pair in flat(item, f"{path}[{number}]")]
    return [(path, value)]


def train(optimizer: torch.optim.Optimizer, model: Layers, steps: range) -> None:
    """Each rank for itself, on the same data."""
    for step in steps:

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model.loss(0, step)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)


@pytest.mark.ranks(1, 2, 3)
def test_broadcast_optimizer_state(world: World) -> None:
    """The root's is unchanged to the last bit and object; the others go on as the root does."""
    for number, make in enumerate(OPTIMIZERS):
        for others_have_state in (False, True):
            root = number % world.size
            model = Layers()
            optimizer = make(list(model.parameters()))
            if isinstance(optimizer, torch.optim.Adam):  # options count too
                optimizer.param_groups[0]["lr"] = 0.25 / (1 + world.rank)
            is_wrapped = hasattr(optimizer, "synchronize")
            if world.rank == root or others_have_state or is_wrapped:  # wrapped, a step is for all ranks
                train(optimizer, model, range(3 + (world.rank if not is_wrapped else 0)))
            state, groups = optimizer.state, optimizer.param_groups
            before = flat(copy.deepcopy(optimizer.state_dict()))
            own = [id(tensor) for of_one in state.values() for tensor in of_one.values()]

            hvd.broadcast_parameters(model.state_dict(), root)
            hvd.broadcast_optimizer_state(optimizer, root)
            after = flat(optimizer.state_dict())
            assert after == world.comm.bcast(after, root)
            if world.rank == root:
                assert after == before
                assert own == [id(tensor) for of_one in optimizer.state.values() for tensor in of_one.values()]
                assert (optimizer.state, optimizer.param_groups) == (state, groups)
            train(optimizer, model, range(10, 13))
            assert_same_on_all_ranks(world, model.parameters())


@pytest.mark.ranks(2)
def test_memory_layout_of_the_state(world: World) -> None:
    """Fused kernels walk through parameter and state side by side in memory."""
    for options in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        weight = torch.nn.Parameter(parameter(4, 3, 2, 2).data.to(memory_format=torch.channels_last))
        optimizer = torch.optim.Adam([weight], lr=0.1, **options)
        weight.grad = values(weight.shape, 0).to(memory_format=torch.channels_last)
        if world.rank == 0:
            optimizer.step()
        hvd.broadcast_parameters([weight])
        hvd.broadcast_optimizer_state(optimizer)
        optimizer.step()
        assert_same_on_all_ranks(world, [weight, *(optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq"))])


@pytest.mark.ranks(2)
def test_optimizers_that_differ(world: World) -> None:
    """The state of one cannot be that of the other: an error where it arrives, and the job goes on."""
    p, q = parameter(3), parameter(2)
    optimizer = torch.optim.Adam([p, q] if world.rank == 0 else [p])
    told = "rank 1 could not load" if world.rank == 0 else r"different|size"
    with pytest.raises(collective.CollectiveError if world.rank == 0 else ValueError, match=told):
        hvd.broadcast_optimizer_state(optimizer)
    assert hvd.allreduce(torch.tensor(1), op=hvd.Sum) == 2


@pytest.mark.ranks(2)
def test_a_state_that_the_root_cannot_read(world: World) -> None:
    optimizer = torch.optim.SGD([parameter(3)])
    optimizer.state["x"] = TwoTensor(torch.ones(2), torch.ones(2))  # type: ignore[index]
    with pytest.raises(collective.CollectiveError, match=r"rank 0 could not read .* TwoTensor"):
        hvd.broadcast_optimizer_state(optimizer)
    assert hvd.allreduce(torch.tensor(1), op=hvd.Sum) == 2


@pytest.mark.ranks(2, 3)
def test_tensors_of_every_kind(world: World) -> None:
    """Any element type of a fixed size travels, and any layout whose elements do not overlap."""

    def state(rank: int) -> dict[str, Any]:
        counting = torch.arange(6.0) + 6 * rank
        return {
            "expanded": counting[:3, None].expand(3, 4),
            "float8": counting.to(torch.float8_e4m3fn),
            "uint32": counting.to(torch.uint32),
            "uint64 with gaps": counting.to(torch.uint64)[::2],
            "complex32": counting.to(torch.complex32),
            "conjugated": torch.complex(counting, counting).conj(),
            "negated": torch.complex(counting, counting).conj().imag,
            "nested": {"list": [counting[:2].clone(), (counting[2:].numpy(),)]},
            "strings": counting.numpy().astype("U3"),
        }

    model, expected = state(world.rank), state(world.size - 1)
    addresses = model["expanded"].data_ptr()
    hvd.broadcast_parameters(model, world.size - 1)
    assert str(model) == str(expected)
    assert model["expanded"].data_ptr() == addresses
    for x in (torch.arange(4.0).to(torch.float8_e5m2), torch.arange(4).to(torch.uint64)):
        assert torch.equal(hvd.allgather(x).view(torch.uint8), x.repeat(world.size).view(torch.uint8))
        assert torch.equal(hvd.scatter(x.repeat(world.size), 0).view(torch.uint8), x.view(torch.uint8))
    with pytest.raises(collective.MismatchError, match="dtype differs"):
        collective.broadcast(np.arange(3).astype("u4" if world.rank else "S4"), name="x")


@pytest.mark.ranks(2)
def test_what_cannot_be_broadcast(world: World) -> None:
    """An error on all ranks, which names it, before anything has moved."""
    model = torch.nn.Linear(2, 2)
    frozen = np.ones(2)
    frozen.flags.writeable = False
    wrong: list[tuple[Any, str]] = [
        (model, "Linear"),
        ({"a": [model]}, "'a.0' is a Linear"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a': .*sparse"),
        ({"a": TwoTensor(torch.ones(2), torch.ones(2))}, "'a': a TwoTensor"),
        ([("a", frozen)], "'a': the array is not writeable"),
        ({"a": torch.ones(4).as_strided((3, 2), (1, 1))}, "'a': elements of the tensor overlap"),
        ("text", "str"),
    ]
    for params, told in wrong:
        w = torch.full((2,), float(world.rank))
        for odd in (None, 0, 1):  # on both ranks, or on one
            is_right = odd not in (None, world.rank)
            where = f"rank {odd}: .*" if is_right else ""
            with pytest.raises(collective.CollectiveError, match=where + told):
                hvd.broadcast_parameters({"a0": w} if is_right else params)
            assert (w == world.rank).all()
    with pytest.warns(UserWarning, match=r"not a tensor: 'a' \(int\)"):
        hvd.broadcast_parameters({"a": 1, "b": torch.ones(1)})


@pytest.mark.ranks(2)
def test_under_another_default_device(world: World) -> None:
    """Scripts make models on `meta` first; what is made here says where."""
    torch.set_default_device("meta")
    try:
        p = torch.nn.Parameter(torch.full((3,), float(world.rank), device="cpu"))
        optimizer = hvd.DistributedOptimizer(torch.optim.Adam([p]))
        hvd.broadcast_parameters([p])
        (hvd.allgather(p) * (hvd.broadcast(p, 1) + hvd.alltoall(p[:2])[0])[:1]).sum().backward()
        optimizer.step()
        hvd.broadcast_optimizer_state(optimizer)
        rows, counts = hvd.alltoall(p.detach()[:2], torch.tensor([1, 1], device="cpu"))
    finally:
        torch.set_default_device(None)
    assert p.device.type == rows.device.type == counts.device.type == "cpu"


@pytest.mark.ranks(2)
def test_tensors_that_are_expanded_on_one_rank_alone(world: World) -> None:
    for odd in range(2):
        row = torch.full((1,), float(world.rank))
        tensor = row.expand(4) if world.rank == odd else torch.full((4,), float(world.rank))
        hvd.broadcast_parameters({"t": tensor}, 1)
        assert torch.equal(tensor, torch.full((4,), 1.0))
    optimizer = torch.optim.SGD([parameter(3)], lr=0.1)
    optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"] = torch.ones(1).expand(3) * 1
    optimizer.state["e"] = torch.full((1,), 1.0 + world.rank).expand(3)  # type: ignore[index]
    hvd.broadcast_optimizer_state(optimizer)
    assert torch.equal(optimizer.state["e"], torch.ones(3))  # type: ignore[index]


@pytest.mark.ranks(2)
def test_an_error_of_a_tensors_own_class(world: World) -> None:
    """On one rank, before anything is sent: the other one hears of it."""
    layer = torch.nn.LazyLinear(2)
    if world.rank == 0:
        layer(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"uninitialized|another rank"):
        hvd.broadcast_parameters(layer.state_dict())
