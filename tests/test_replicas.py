"""The replica guard: one bit anywhere is found and named, on all ranks alike; what is equal is left as it is."""

import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import collective
import collective.torch as hvd
from collective import CollectiveError, ReplicaError
from collective.torch import replicas
from collective.torch.replicas import Difference
from harness.plugin import World
from test_optimizer import OPTIMIZERS
from test_optimizer import trained as trained_part
from training import Layers, assert_same_on_all_ranks, bits, values

DTYPES = [
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


class Model(torch.nn.Module):
    """Tensors of every dtype and several layouts, equal on all ranks; NaNs among them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.transposed = torch.nn.Parameter(torch.empty(4, 6).t())
        self.gaps = torch.nn.Parameter(torch.empty(5, 8)[:, ::2])
        self.nothing = torch.nn.Parameter(torch.empty(0, 3))
        for dtype in DTYPES:
            self.register_buffer(f"of {str(dtype)[6:]}", torch.zeros(3, 5, dtype=dtype), persistent=False)
        self.register_buffer("channels", torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last))
        with torch.no_grad():
            for salt, tensor in enumerate([*self.parameters(), *self.buffers()]):
                tensor.copy_(values(tensor.shape, 9, salt))
            self.linear.weight[0, 0] = float("nan")

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


@torch.no_grad()
def flip(tensor: torch.Tensor, position: int, bit: int) -> None:
    """Change one bit of one element."""
    element = tensor.flatten()[position].clone()
    as_bytes = element.reshape(1).view(torch.uint8)
    as_bytes[bit // 8] ^= 1 << bit % 8
    index = []
    for size in reversed(tensor.shape):
        index.append(position % size)
        position //= size
    tensor[tuple(reversed(index))] = element


def trained(**options: Any) -> tuple[Layers, Any]:
    """A model after two steps of Adam."""
    model = Layers()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, **options)
    for step in range(2):
        optimizer.zero_grad()
        model.loss(0, step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model, optimizer


def refused(check: Callable[[], Any]) -> str:
    with pytest.raises(ReplicaError) as caught:
        check()
    return str(caught.value)


@pytest.mark.ranks(1, 2, 3)
def test_equal_replicas_pass_and_stay_as_they_are(world: World) -> None:
    model = Model()
    before = {name: (bits(t), t._version, t.data_ptr()) for name, t in model.tensors().items()}
    report = hvd.check_replicas(model)
    assert report == hvd.ReplicaReport(len(before), sum(t.nbytes for t in model.tensors().values()))
    assert before == {name: (bits(t), t._version, t.data_ptr()) for name, t in model.tensors().items()}
    layers, optimizer = trained()
    # 6 parameters with step, exp_avg, exp_avg_sq; and the group's options.
    assert hvd.check_replicas(layers, optimizer).count == 6 * 4 + len(optimizer.param_groups[0]) - 1


@pytest.mark.ranks(2, 3)
def test_one_bit_of_any_tensor_is_found(world: World) -> None:
    """Of every dtype and layout; the first and last bit, in the first and last element."""
    liar = world.size - 1
    for name in Model().tensors():
        for number, place in enumerate(("first", "last")):
            model = Model()
            tensor = model.tensors()[name]
            if tensor.numel() == 0 or (tensor.dtype == torch.bool and number):
                continue
            if world.rank == liar:
                flip(tensor, 0 if number == 0 else tensor.numel() - 1, 0 if number == 0 else tensor.itemsize * 8 - 1)
            said = refused(partial(hvd.check_replicas, model))
            what = f"first '{name}' ({tensor.dtype} {tuple(tensor.shape)}) on rank "
            assert f"check_replicas: 1 of {len(model.tensors())} tensors and numbers differ" in said, (place, said)
            assert what + (str(liar) if world.size > 2 else "1") in said, (place, said)


@pytest.mark.ranks(3)
def test_two_bits_that_a_sum_would_lose_are_found(world: World) -> None:
    """Signs, exchanged elements, zeros of either sign, and NaNs of different payloads."""
    changes: list[Callable[[torch.Tensor], Any]] = [
        lambda x: (flip(x, 3, 63), flip(x, 8, 63)),
        lambda x: x.copy_(x.flip(0)),
        lambda x: flip(x, 20, 63),  # 0.0 to -0.0
        lambda x: flip(x, 21, 0),  # a NaN's last bit
    ]
    for change in changes:
        model = Layers()
        with torch.no_grad():
            model[1].weight[4, 0], model[1].weight[4, 1] = 0.0, float("nan")
            if world.rank == 0:
                change(model[1].weight)
        assert "first '1.weight' (torch.float64 (5, 5)) on rank 0" in refused(partial(hvd.check_replicas, model))


@pytest.mark.ranks(2, 3)
def test_the_state_of_an_optimizer_is_compared(world: World) -> None:
    changes: dict[str, Callable[[Any], Any]] = {
        "optimizer.state.1.weight.exp_avg": lambda o: flip(list(o.state.values())[2]["exp_avg"], 7, 0),
        "optimizer.state.2.bias.step": lambda o: list(o.state.values())[5]["step"].add_(1),
        "optimizer.group.0.lr": lambda o: o.param_groups[0].update(lr=0.02),
        "optimizer.group.0.betas": lambda o: o.param_groups[0].update(betas=(0.9, 0.99)),
    }
    for name, change in changes.items():
        model, optimizer = trained()
        if world.rank == 1:
            change(optimizer)
        said = refused(partial(hvd.check_replicas, model, optimizer))
        assert f"1 of {6 * 4 + len(optimizer.param_groups[0]) - 1} tensors and numbers differ" in said
        assert f"first '{name}' (" in said
        assert ") on rank 1" in said
        hvd.check_replicas(model)  # which is equal

    class Counting(torch.optim.SGD):
        """Keeps a plain number, nested lists, and something of its own."""

    model = Layers()
    optimizer = Counting(model.parameters(), lr=0.1)
    optimizer.state[model[0].bias] = {"n": 3, "history": [torch.ones(2), {"x": 1.5 + world.rank}], "o": object()}
    optimizer.state["all"] = {"pair": (torch.zeros(2), 4)}
    assert "1 of " in refused(partial(hvd.check_replicas, model, optimizer))
    with pytest.warns(UserWarning, match="rank 0: 'optimizer.state.0.bias.history.1.x'"):
        hvd.check_replicas(model, optimizer, repair=True)
    assert optimizer.state[model[0].bias]["history"][1] == {"x": 1.5}
    optimizer.state["all"]["pair"] = (torch.zeros(2), world.rank)
    assert "is in a tuple" in refused(partial(hvd.check_replicas, model, optimizer, repair=True))


@pytest.mark.parametrize(
    ("hashes", "wrong"),
    [
        ([1, 0, 0, 0], (0,)),
        ([0, 0, 7, 0], (2,)),
        ([0, 1, 2, 3], (1, 2, 3)),
        ([5, 1, 1, 3], (0, 3)),
        ([0, 1, 1, 0], (1, 2)),
        ([9, 1, 1, 2, 2], (0, 3, 4)),
        ([2**64 - 1] * 3, None),
    ],
)
def test_the_majority_is_right(hashes: list[int], wrong: tuple[int, ...] | None) -> None:
    """In a tie it is the part with the lowest rank."""
    everyone = [replicas._Digests(rank, ["w"], [("int", ())], [one]) for rank, one in enumerate(hashes)]
    expected = [] if wrong is None else [Difference("w", "int", (), wrong)]
    assert replicas._differences(everyone) == expected


@pytest.mark.ranks(3)
def test_several_ranks_that_differ_are_named(world: World) -> None:
    model = Layers()
    with torch.no_grad():
        model[0].bias[0] = world.rank
        model[2].bias[0] = [0, 1, 1][world.rank]
    said = refused(partial(hvd.check_replicas, model))
    assert said.endswith(
        "2 of 6 tensors and numbers differ between ranks, first '0.bias' (torch.float64 (5,)) on ranks 1, 2"
    )


@pytest.mark.ranks(2, 3)
def test_repair_gives_all_ranks_what_rank_0_has(world: World) -> None:
    model, expected = Model(), Model()
    layers, optimizer = trained()
    model.layers, expected.layers = layers, trained()[0]
    names = ["transposed", "gaps", "of bfloat16", "of bool", "channels", "layers.0.weight"]
    for number, name in enumerate(names):
        if world.rank == 1 + number % (world.size - 1):
            flip(model.tensors()[name], 1, 0)
    if world.rank == 1:
        optimizer.param_groups[0]["lr"] = 0.5
        flip(optimizer.state[layers[0].bias]["exp_avg_sq"], 2, 3)
    addresses = [tensor.data_ptr() for tensor in model.tensors().values()]
    with pytest.warns(UserWarning, match=r"check_replicas: 8 of .* Overwritten by the values of rank 0: .* 2 more$"):
        report = hvd.check_replicas(model, optimizer, repair=True)
    assert {difference.name for difference in report.differences} == {
        *names,
        "optimizer.group.0.lr",
        "optimizer.state.layers.0.bias.exp_avg_sq",
    }
    for name, tensor in model.tensors().items():
        assert bits(tensor) == bits(expected.tensors()[name]), name
    assert addresses == [tensor.data_ptr() for tensor in model.tensors().values()]
    assert optimizer.param_groups[0]["lr"] == 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hvd.check_replicas(model, optimizer, repair=True).differences == ()


@pytest.mark.ranks(2, 3)
def test_different_models_are_named(world: World) -> None:
    odd = world.size - 1
    for repair in (False, True):
        model = Layers(depth=3 if world.rank == odd else 2)
        said = refused(partial(hvd.check_replicas, model, repair=repair))
        assert f"rank 0 has 4 tensors and numbers, rank {odd} 6; of these two only rank {odd} has '2.weight'" in said
    model = Layers(dtype=torch.float32 if world.rank == odd else torch.float64)
    said = refused(partial(hvd.check_replicas, model))
    assert f"'0.weight' is torch.float64 (5, 5) on rank 0, torch.float32 (5, 5) on rank {odd}" in said
    model = Layers(width=6 if world.rank == 0 else 5)
    assert "(6, 6) on rank 0, torch.float64 (5, 5) on rank 1" in refused(partial(hvd.check_replicas, model))
    layers, optimizer = trained()
    if world.rank == odd:
        optimizer.state.clear()  # has not stepped
    said = refused(partial(hvd.check_replicas, layers, optimizer))
    assert "of these two only rank 0 has 'optimizer.state.0.weight.exp_avg'" in said
    collective.barrier()


@pytest.mark.ranks(2, 3)
def test_what_cannot_be_read_on_one_rank_is_an_error_on_all(world: World) -> None:
    model = Layers()
    if world.rank == 1:
        model.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(CollectiveError, match=r"rank 1: check_replicas: 'sparse': a torch.Tensor of layout"):
        hvd.check_replicas(model)
    hvd.check_replicas(Layers())
    with pytest.raises(collective.InvalidArgumentError, match=r"takes a torch\.nn.Module, not a OrderedDict"):
        hvd.check_replicas(model.state_dict())


@pytest.mark.ranks(2)
def test_statistics_of_batch_norm_may_be_left_out(world: World) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    hvd.broadcast_parameters(model.state_dict())
    model(torch.rand(4, 3) + world.rank)
    assert "each rank gathers by itself: buffers=False" in refused(partial(hvd.check_replicas, model))
    assert hvd.check_replicas(model, buffers=False).count == 4


@pytest.mark.ranks(3)
def test_a_process_set_compares_among_itself(world: World) -> None:
    some = hvd.add_process_set(range(1, world.size))
    model = Layers()
    with torch.no_grad():
        model[0].weight[0, 0] = float(world.rank == 0)
    if some.included():
        hvd.check_replicas(model, process_set=some)
        if world.rank == 2:
            flip(model[2].bias, 0, 1)
        said = refused(partial(hvd.check_replicas, model, process_set=some))
        assert "first '2.bias' (torch.float64 (5,)) on rank 2" in said
        with pytest.warns(UserWarning, match="values of rank 1: '2.bias'"):
            report = hvd.check_replicas(model, repair=True, process_set=some)
        assert report.differences == (Difference("2.bias", "torch.float64", (5,), (2,)),)
    else:
        with pytest.raises(collective.InvalidArgumentError, match="this rank is not in process set"):
            hvd.check_replicas(model, process_set=some)
    assert "'0.weight'" in refused(partial(hvd.check_replicas, model))
    hvd.remove_process_set(some)


def step(model: Layers, optimizer: Any, rank: int, number: int) -> None:
    optimizer.zero_grad()
    model.loss(rank, number).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("op", [hvd.Average, hvd.Adasum])
def test_an_optimizer_checks_every_kth_step(world: World, op: int) -> None:
    model = Layers()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(adam, model.named_parameters(), op=op, check_replicas_every=3)
    for number in range(1, 5):
        step(model, optimizer, world.rank, number)
    if world.rank == world.size - 1:
        flip(optimizer.state[model[1].weight]["exp_avg"], 3, 50)
    step(model, optimizer, world.rank, 5)
    if op == hvd.Adasum:  # compares no state, of which each rank has its own; and each rank adds what it has changed
        step(model, optimizer, world.rank, 6)
        if world.rank == world.size - 1:
            flip(model[1].weight, 3, 0)
        step(model, optimizer, world.rank, 7)
        step(model, optimizer, world.rank, 8)
    said = refused(partial(step, model, optimizer, world.rank, 6 if op == hvd.Average else 9))
    assert "'1.weight'" in said
    assert f"on rank {world.size - 1 if world.size > 2 else 1}" in said
    step(model, optimizer, world.rank, 10)  # the runtime goes on
    with pytest.warns(UserWarning, match="values of rank 0"):
        hvd.check_replicas(model, optimizer, repair=True)
    step(model, optimizer, world.rank, 11)
    step(model, optimizer, world.rank, 12)
    assert_same_on_all_ranks(world, model.parameters())


@pytest.mark.ranks(2)
def test_the_state_of_every_kind_of_optimizer_is_equal(world: World) -> None:
    for make in (*OPTIMIZERS, partial(torch.optim.LBFGS, max_iter=3)):
        model = Layers()
        optimizer: Any = hvd.DistributedOptimizer(make(trained_part(make, model)), check_replicas_every=1)

        def closure(model: Layers = model, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model.loss(world.rank)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        for _ in range(3):
            optimizer.step(closure)
        assert hvd.check_replicas(model, optimizer).count > len(list(model.parameters()))


@pytest.mark.ranks(2)
def test_only_an_optimizer_that_checks_has_a_hook_for_it(world: World) -> None:
    model = Layers()
    optimizer: Any = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    checks: Any = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), check_replicas_every=1)
    # One counts steps.
    assert (len(optimizer._optimizer_step_post_hooks), len(checks._optimizer_step_post_hooks)) == (1, 2)
    for wrong in (-1, 2.0, "3"):
        with pytest.raises(collective.InvalidArgumentError, match="check_replicas_every"):
            hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), check_replicas_every=wrong)


@pytest.mark.ranks(2, 3)
def test_steps_are_counted_alike_after_a_join(world: World) -> None:
    """While some ranks have joined, the others compare among themselves."""
    model = Layers()
    optimizer: Any = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), check_replicas_every=2
    )
    for number in range(3 + 2 * world.rank):
        step(model, optimizer, world.rank, number)
    hvd.join()
    hvd.broadcast_parameters(model.state_dict())
    for number in range(3):
        step(model, optimizer, world.rank, number)
    flip(model[0].bias, 0, world.rank)
    assert "on rank" in refused(partial(step, model, optimizer, world.rank, 4))


@pytest.mark.ranks(2)
def test_a_checkpoint_is_as_without_it(world: World) -> None:
    model = Layers()
    optimizer: Any = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), check_replicas_every=1)
    step(model, optimizer, world.rank, 0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    step(model, optimizer, world.rank, 1)
