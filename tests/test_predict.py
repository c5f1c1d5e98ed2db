"""The predictor: that its costs are those of docs/algorithms.md, its plan the reducer's, and its replay right; never
how long anything took."""

import argparse
import importlib.util
import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from collective.bench.units import parse_counts, parse_factor, parse_rate, parse_seconds
from collective.predict.cli import _parser
from collective.predict.costs import (
    SHORT,
    Machine,
    Phase,
    bucket,
    bucket_in_messages,
    bucket_on_node,
    bucket_on_nodes,
    recursive_doubling,
    ring,
)
from collective.predict.replay import Computation, Work, replay
from harness.mpirun import run_ranks

ROOT = Path(__file__).parents[1]
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
needs_rich = pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="needs rich")

MACHINE = Machine(latency=10e-6, bandwidth=1e9, node_latency=2e-6, memory_bandwidth=10e9)
UNIT = Machine(latency=1.0, bandwidth=1.0, node_latency=1.0, memory_bandwidth=1.0)  # seconds are steps and bytes


# ---- costs ----


def ring_sent(p: int, chunk: int) -> list[int]:
    """Bytes that each rank of a ring sends, message by message."""
    sent = [0] * p
    for _half in range(2):
        for _step in range(p - 1):
            for rank in range(p):
                sent[rank] += chunk
    return sent


def doubling_sent(p: int, nbytes: int) -> tuple[list[int], int]:
    """Bytes that each rank sends in recursive doubling, and the messages that follow each other."""
    power = 1 << (p.bit_length() - 1)
    sent = [0] * p
    messages = 0
    pairs = [(2 * i, 2 * i + 1) for i in range(p - power)]
    for even, _ in pairs:
        sent[even] += nbytes
    active = [odd for _, odd in pairs] + list(range(2 * (p - power), p))
    bit = 1
    while bit < power:
        for rank in active:
            sent[rank] += nbytes
        messages += 1
        bit *= 2
    for _, odd in pairs:
        sent[odd] += nbytes
    return sent, messages + (2 if pairs else 0)


@pytest.mark.parametrize("p", [2, 3, 4, 7, 64])
def test_a_ring_sends_what_is_counted(p: int) -> None:
    nbytes = 5040 * 1024 * p
    phase = ring(p, nbytes)
    assert {phase.wire} == set(ring_sent(p, nbytes // p)) == {2 * (p - 1) * nbytes // p}
    assert phase.messages == 2 * (p - 1)
    assert phase.memory == pytest.approx(3 * (p - 1) / p * nbytes)


@pytest.mark.parametrize("p", [2, 3, 4, 5, 8, 13, 512])
def test_recursive_doubling_sends_what_is_counted(p: int) -> None:
    sent, messages = doubling_sent(p, 1000)
    phase = recursive_doubling(p, 1000)
    assert (phase.wire, phase.messages) == (max(sent), messages)


@pytest.mark.parametrize(("nodes", "ranks"), [(2, 2), (3, 4), (128, 4), (5, 1)])
def test_each_byte_crosses_the_network_once_per_node(nodes: int, ranks: int) -> None:
    """2 (n-1)/n N bytes, however many ranks divide them; and the page still says so."""
    page = (ROOT / "docs" / "algorithms.md").read_text()
    assert "2 (n-1)/n N per node each way" in page
    assert "per node of m ranks, m N loads and m N stores" in page
    nbytes = 16 << 20
    phases = bucket(nodes, ranks, nbytes, packed=2 * nbytes)
    (crossing,) = [phase for phase in phases if phase.on_link]
    assert crossing.wire == pytest.approx(2 * (nodes - 1) / nodes * nbytes)
    assert crossing.messages == 2 * (nodes - 1)
    assert sum(phase.synchronisations for phase in phases) == (2 if ranks > 1 else 0)
    on_nodes = sum(phase.memory for phase in phases if not phase.on_link)
    packed = 2 * nbytes * ranks
    assert on_nodes == (packed + 2 * ranks * nbytes if ranks > 1 else packed)


def test_a_bucket_on_one_node_needs_no_wire() -> None:
    p, nbytes = 4, 1 << 20
    (phase,) = bucket_on_node(p, nbytes, packed=2 * nbytes)
    assert (phase.wire, phase.messages, phase.synchronisations) == (0, 0, 2)
    # N loads and N stores of each rank, and (p-1)/p N more of both to pack.
    assert phase.memory == p * (2 * nbytes + (p - 1) / p * 2 * nbytes)
    assert bucket_on_node(p, nbytes, packed=0)[0].memory == p * 2 * nbytes
    assert bucket(1, 1, nbytes, 2 * nbytes) == ()


def test_slices_below_16_kib_go_by_recursive_doubling() -> None:
    source = (ROOT / "csrc" / "base" / "thresholds.h").read_text()
    found = re.search(r"kRing = size_t\{(\d+)\} << (\d+)", source)
    assert found
    assert int(found[1]) << int(found[2]) == SHORT

    def name(phases: tuple[Phase, ...]) -> str:
        return next(phase.name for phase in phases if phase.on_link)

    assert name(bucket_in_messages(4, SHORT, 0)) == "ring"
    assert name(bucket_in_messages(4, SHORT - 4, 0)) == "doubling"
    assert name(bucket_on_nodes(4, 2, 2 * SHORT, 0)) == "ring"
    assert name(bucket_on_nodes(4, 2, 2 * SHORT - 8, 0)) == "doubling"


def test_time_is_steps_by_latency_and_bytes_over_bandwidth() -> None:
    phase = ring(4, 4e6)
    assert phase.alone(MACHINE) == pytest.approx(6 * 10e-6 + 6e6 / 1e9)
    slow_memory = replace(MACHINE, memory_bandwidth=1e9)  # 9 MB through it take longer than 6 MB on the wire
    assert phase.alone(slow_memory) == pytest.approx(6 * 10e-6 + 9e6 / 1e9)
    assert Phase("x", starts=1).alone(replace(MACHINE, overhead=0.5)) == 0.5


BYTES = st.integers(1, 1 << 30)
SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 16)).filter(lambda shape: shape != (1, 1))


def seconds(phases: tuple[Phase, ...], machine: Machine = MACHINE) -> float:
    return sum(phase.alone(machine) for phase in phases)


@given(SHAPES, BYTES, BYTES, st.floats(1, 1000))
def test_more_costs_more_and_faster_takes_less(shape: tuple[int, int], a: int, b: int, factor: float) -> None:
    nodes, ranks = shape
    few, many = sorted((a, b))
    phases = bucket(nodes, ranks, few, 2 * few)
    if (few < ranks * SHORT) == (many < ranks * SHORT):  # by the same algorithm
        assert seconds(phases) <= seconds(bucket(nodes, ranks, many, 2 * many)) * (1 + 1e-12)
    for name in ("bandwidth", "memory_bandwidth"):
        assert seconds(phases, replace(MACHINE, **{name: factor * getattr(MACHINE, name)})) <= seconds(phases)
    for name in ("latency", "node_latency"):
        assert seconds(phases, replace(MACHINE, **{name: factor * getattr(MACHINE, name)})) >= seconds(phases)
    if few >= ranks * SHORT:
        assert seconds(phases) <= seconds(bucket(nodes + 1, ranks, few, 2 * few)) or nodes == 1
    assert seconds(bucket(nodes, ranks, few, 0)) <= seconds(phases)


# ---- the replay ----


def wire(nbytes: float, messages: int = 1) -> Phase:
    return Phase("crossing", messages=messages, wire=nbytes)


NO_LATENCY = replace(UNIT, latency=0.0)


def test_what_backward_does_not_hide_is_added() -> None:
    computation = Computation(forward=1.0, backward=2.0, optimizer=0.5)
    done = replay(computation, [Work(2.0, [wire(3.0)])], UNIT)
    assert (done.computed, done.started, done.done, done.step) == (3.0, [3.0], [7.0], 7.5)
    hidden = replay(computation, [Work(0.0, [wire(0.5)])], UNIT)
    assert (hidden.done, hidden.step) == ([2.5], 3.5)
    fetched = replay(computation, [Work(0.0, [wire(0.5)])], UNIT, fetch=0.25)
    assert fetched.step == 3.75
    assert replay(computation, [Work(1.0, [])], UNIT).step == computation.total
    assert replay(computation, [Work(9.0, [wire(1.0)])], UNIT).done == [5.0]  # ready when backward ends


def test_buckets_in_flight_share_the_link() -> None:
    computation = Computation(0.0, 4.0, 0.0)
    # Alone until 1; then both at half the rate; the first one has 1 of 2 left.
    done = replay(computation, [Work(0.0, [wire(2.0)]), Work(1.0, [wire(2.0)])], NO_LATENCY)
    assert done.done == pytest.approx([3.0, 4.0])
    assert replay(computation, [Work(0.0, [wire(2.0)])] * 3, NO_LATENCY).done == pytest.approx([6.0] * 3)


def test_latencies_of_several_buckets_pass_at_the_same_time() -> None:
    computation = Computation(0.0, 0.0, 0.0)
    # 1 of latency and 1 on the link each: a half of the link is all that either can use.
    assert replay(computation, [Work(0.0, [wire(1.0)])] * 2, UNIT).done == pytest.approx([2.0, 2.0])
    # Three want 3/2 of it.
    assert replay(computation, [Work(0.0, [wire(1.0)])] * 3, UNIT).done == pytest.approx([3.0] * 3)
    # One wants a tenth and gets it; the other gets the rest, until it is done.
    slow, fast = Phase("slow", messages=9, wire=1.0), Phase("fast", messages=0, wire=0.0, memory=1.0)
    assert replay(computation, [Work(0.0, [slow]), Work(0.0, [fast])], UNIT).done == pytest.approx([10.0, 1.0])
    unequal = replace(UNIT, latency=1.0)
    assert replay(
        computation, [Work(0.0, [wire(1.0, messages=9)]), Work(0.0, [wire(9.0, messages=1)])], unequal
    ).done == pytest.approx([10.0, 10.0])


def test_one_bucket_is_on_the_link_while_the_next_is_packed() -> None:
    phases = [Phase("pack", memory=1.0), wire(2.0)]
    done = replay(Computation(0.0, 0.0, 0.0), [Work(0.0, [Phase("pack", memory=1.0), wire(2.0)])], NO_LATENCY)
    assert done.done == [3.0]
    computation = Computation(0.0, 1.0, 0.0)
    done = replay(computation, [Work(0.0, phases), Work(1.0, phases)], NO_LATENCY)
    assert done.done == pytest.approx([4.0, 5.0])  # both on the link from 2 on, with 1 and 2 left


def test_computation_slows_while_a_bucket_is_in_flight() -> None:
    done = replay(Computation(0.0, 2.0, 0.0), [Work(0.0, [wire(1.0)])], NO_LATENCY, slowdown=2.0)
    assert (done.done, done.computed) == ([1.0], 2.5)  # half a second of work by then
    done = replay(Computation(1.0, 1.0, 1.0), [Work(1.0, [wire(1.0)])], NO_LATENCY, slowdown=2.0)
    assert (done.computed, done.done, done.step) == (2.0, [3.0], 4.0)


WORK = st.builds(
    lambda ready, wired, messages, memory: Work(
        ready, [Phase("pack", memory=memory), Phase("x", messages=messages, wire=wired)]
    ),
    *(st.floats(0, 5), st.floats(0, 3), st.integers(1, 9), st.floats(0, 3)),
)


@settings(deadline=None)
@given(st.lists(WORK, max_size=6), st.floats(0, 5), st.floats(0, 5))
@example([Work(0.0, [Phase("pack", memory=nbytes), wire(0.0)]) for nbytes in (1.0, 2.3e-311)], 0.0, 0.0)
def test_a_step_lies_between_its_bounds(work: list[Work], forward: float, backward: float) -> None:
    computation = Computation(forward, backward, 1.0)
    machine = replace(UNIT, latency=0.1)
    done = replay(computation, work, machine)
    alone = [sum(phase.alone(machine) for phase in one.phases) for one in work]
    slack = 1e-6
    for started, ended, least, one in zip(done.started, done.done, alone, work, strict=True):
        assert started == pytest.approx(forward + min(one.ready, backward), abs=slack)
        assert ended >= started + least - slack
    assert computation.total - slack <= done.step <= computation.total + sum(alone) + slack
    on_link = sum(one.phases[1].busy(machine) for one in work)
    if work:
        assert max(done.done) - min(done.started) >= on_link - slack


# ---- profiles and plans ----


@needs_torch
@pytest.mark.parametrize(
    ("name", "parameters", "giga"),
    [("inception_v3", 23_834_568, 5.7), ("resnet101", 44_549_160, 7.8), ("vgg16", 138_357_544, 15.5)],
)
def test_published_networks_have_their_known_sizes(name: str, parameters: int, giga: float) -> None:
    from collective.predict.published import BATCH, PUBLISHED, published_profile

    profile = published_profile(name)
    assert sum(math.prod(gradient.shape) for gradient in profile.gradients) == parameters
    layers = PUBLISHED[name].layers()
    assert sum(layer.multiplications for layer in layers) / 1e9 == pytest.approx(giga, abs=0.05)
    ready = [gradient.ready for gradient in profile.gradients]
    assert ready == sorted(ready)
    assert ready[-1] == pytest.approx(profile.computation.backward)
    assert profile.computation.total == pytest.approx(BATCH / PUBLISHED[name].images_per_second)


@needs_torch
def test_resnet101_differs_from_resnet50_in_one_stage() -> None:
    from collective.bench.resnet50 import gradient_shapes
    from collective.predict.published import PUBLISHED

    ours = Counter(shape for layer in PUBLISHED["resnet101"].layers() for shape in layer.shapes)
    ours.subtract(Counter(shape for _, shape in gradient_shapes()))
    block = {(256, 1024, 1, 1): 17, (256, 256, 3, 3): 17, (1024, 256, 1, 1): 17, (256,): 4 * 17, (1024,): 2 * 17}
    assert {shape: count for shape, count in ours.items() if count} == block


@needs_torch
def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    from collective.predict.profile import read_profile, write_profile
    from collective.predict.published import published_profile

    profile = published_profile("resnet101")
    write_profile(tmp_path / "profile.json", profile)
    assert read_profile(tmp_path / "profile.json") == profile


@needs_torch
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "its format is 'other'"),
        ({"gradients": []}, "it has no gradients"),
        ({"computation": {"forward": 1}}, "it has no 'backward'"),
        ({"computation": {"forward": -1, "backward": 1, "optimizer": 1}}, "-1 is not a time"),
        ({"gradients": [{"name": "w", "shape": [2], "dtype": "float33", "ready": 0}]}, "no dtype 'float33'"),
        ({"gradients": 3}, "not iterable"),
    ],
)
def test_another_file_is_no_profile(change: dict[str, object], message: str, tmp_path: Path) -> None:
    from collective.predict.profile import read_profile, write_profile
    from collective.predict.published import published_profile

    file = tmp_path / "profile.json"
    write_profile(file, published_profile("vgg16"))
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"profile.json is not a profile: .*{message}"):
        read_profile(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="is not a profile"):
        read_profile(file)


@needs_torch
def test_a_prediction_is_put_together_from_its_parts() -> None:
    from collective.predict.prediction import Setting, predict
    from collective.predict.profile import Gradient, Profile

    mega = 1 << 20
    gradients = [Gradient(name, (mega,), "float32", ready) for name, ready in [("c", 0.1), ("b", 0.2), ("a", 0.25)]]
    profile = Profile("three", "made up", Computation(0.5, 0.3, 0.1), gradients)
    machine = Machine(latency=0.0, bandwidth=4 * mega, node_latency=0.0, memory_bandwidth=math.inf)
    single = predict(profile, Setting(1, 1, machine), 4 * mega)
    assert (single.step, single.exposed, single.efficiency) == (pytest.approx(0.9), pytest.approx(0), pytest.approx(1))
    # Each bucket takes a second: the first from 0.6 on; the others when they are ready, the last when backward ends.
    two = predict(profile, Setting(2, 1, machine), 4 * mega)
    assert two.buckets == [4 * mega] * 3
    assert two.replay.started == pytest.approx([0.6, 0.7, 0.8])
    assert two.step == pytest.approx(0.6 + 3 + 0.1)
    assert two.communication == pytest.approx(3)
    halved = predict(profile, Setting(2, 1, machine, compressed=True), 4 * mega)
    assert halved.buckets == [2 * mega] * 3
    assert halved.step == pytest.approx(0.6 + 1.5 + 0.1)
    assert predict(profile, Setting(2, 4, machine), 4 * mega).step == pytest.approx(two.step)  # they share the link
    # Compressed results are cast back: 6 bytes of each element pass through memory.
    slow = replace(machine, bandwidth=math.inf, memory_bandwidth=6 * mega)
    assert predict(profile, Setting(2, 1, slow, True), 4 * mega).step > 0.5 + 3 + 3


@needs_torch
def test_the_best_bucket_is_neither_all_nor_one() -> None:
    from collective.predict.prediction import Setting, best, predict
    from collective.predict.published import published_profile

    profile = published_profile("resnet101")
    thresholds = [1 << shift for shift in range(20, 29)]
    setting = Setting(128, 4, Machine(30e-6, 1.5e9, 2e-6, 40e9))
    found = best(profile, setting, thresholds)
    steps = [predict(profile, setting, threshold).step for threshold in thresholds]
    assert min(steps) <= found.step <= 1.001 * min(steps)
    assert found.threshold < thresholds[-1]


@needs_torch
def test_the_sweep_finds_what_times_were_made_from() -> None:
    from collective.predict.sweep import fit

    rows = [[1.0, messages, nbytes] for messages, nbytes in [(1, 1e3), (1, 8e3), (2, 16e3), (2, 1e6), (2, 16e6)]]
    truth = [5e-5, 2e-5, 8e-9]
    times = [sum(a * b for a, b in zip(row, truth, strict=True)) for row in rows]
    assert fit(rows, times) == pytest.approx(truth)
    # An overhead below 0 would fit best here.
    found = fit(rows, [time - 6e-5 for time in times])
    assert found[0] == 0
    assert min(found) >= 0


# ---- the command line ----


def test_times_rates_and_counts() -> None:
    assert [parse_seconds(text) for text in ("2us", "0.5 ms", "1s", "100ns")] == pytest.approx([2e-6, 5e-4, 1, 1e-7])
    assert [parse_rate(text) for text in ("25Gbit", "3GB/s", "100 Mbit/s", "1.5kB")] == [3.125e9, 3e9, 1.25e7, 1500]
    assert parse_counts("1,2,8:40,3") == [1, 2, 3, 8, 16, 32]
    assert parse_factor("1.5") == 1.5
    for parse, wrong in [
        (parse_seconds, ("2", "us", "-1s", "2m", "")),
        (parse_rate, ("25", "25Gb", "0Gbit", "fast", "-1GB")),
        (parse_counts, ("0", "", "1,,2", "8:4", "1K", "1:2:3")),
        (parse_factor, ("0.5", "nan", "", "-2")),
    ]:
        for text in wrong:
            with pytest.raises(argparse.ArgumentTypeError):
                parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --model --profile --published is required"),
        (["--published", "vgg11"], "invalid choice: 'vgg11'"),
        (["--published", "vgg16", "--profile", "x"], "not allowed with"),
        (["--published", "vgg16", "--latency", "2"], "'2' is not a time such as 2us"),
        (["--published", "vgg16", "--bandwidth", "25Gb"], "'25Gb' is not a rate such as 25Gbit"),
        (["--published", "vgg16", "--nodes", "0"], "'0' is neither a positive number nor a range"),
        (["--published", "vgg16", "--ranks-per-node", "no"], "'no' is not a positive number"),
        (["--published", "vgg16", "--compression", "int8"], "invalid choice: 'int8'"),
        (["--published", "vgg16", "--bucket-sizes", "4:1"], "is not a range"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(arguments)
    assert message in capsys.readouterr().err


@needs_torch
def test_a_wrong_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collective.predict.training import find

    (tmp_path / "some_models.py").write_text("number = 3\ndef nothing(): return None\ndef three(): return 1, 2, 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    for text, message in [
        ("resnet", "neither of resnet50, waiting, mlp nor module:callable"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("some_models:absent", "has no callable 'absent'"),
        ("some_models:number", "has no callable 'number'"),
    ]:
        with pytest.raises(ValueError, match=message):
            find(text)
    for text, message in [("nothing", "returned NoneType"), ("three", "did not return")]:
        with pytest.raises(ValueError, match=message):
            find(f"some_models:{text}")()
    assert sys.modules.pop("some_models")


@needs_torch
def test_a_model_that_cannot_be_profiled_is_refused() -> None:
    import torch

    from collective.predict.profile import take_profile
    from collective.predict.training import Training

    class Idle(torch.optim.Optimizer):
        """Without torch's constructor, which imports its compiler."""

        def __init__(self, *parameters: torch.nn.Parameter) -> None:
            self.param_groups = [{"params": list(parameters)}]

        def zero_grad(self, set_to_none: bool = True) -> None:
            pass

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            pass

    net, other = torch.nn.Linear(2, 1), torch.nn.Parameter(torch.ones(2))
    frozen, elsewhere = torch.nn.Parameter(torch.ones(2), False), torch.nn.Parameter(torch.ones(2, device="meta"))
    for optimizer, message in [
        (Idle(other), "no gradient of a parameter of the optimizer"),
        (Idle(frozen), "no parameter that is trained"),
        (Idle(elsewhere), "parameters on meta; profiles are taken on the CPU only"),
    ]:
        with pytest.raises(ValueError, match=message):
            take_profile(Training(net, optimizer, lambda: net(torch.ones(2)).sum()), "net", 1)
    profile = take_profile(Training(net, Idle(*net.parameters(), other), lambda: net(torch.ones(2)).sum()), "net", 2)
    assert {gradient.name for gradient in profile.gradients[:2]} == {"weight", "bias"}
    last = profile.gradients[-1]  # it never comes
    assert (last.name, last.shape, last.ready) == ("parameter.0", (2,), profile.computation.backward)


@needs_torch
@needs_rich
def test_a_wrong_combination_is_told_once_and_ends_every_rank() -> None:
    done = run_ranks(2, ["-m", "collective.predict", "--published", "vgg16", "--nodes", "1:4"], 60)
    assert done.returncode != 0
    assert done.stderr.count("--latency and --bandwidth are needed: this job is on one node") == 1


@needs_torch
@needs_rich
def test_one_rank_predicts_for_many(tmp_path: Path) -> None:
    from collective.predict.costs import Machine as Read
    from collective.predict.prediction import Setting, predict
    from collective.predict.profile import read_profile

    out, saved, picture = tmp_path / "out.json", tmp_path / "profile.json", tmp_path / "scaling.svg"
    plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    done = run_ranks(
        1,
        ["-m", "collective.predict", "--model", "mlp", "--steps", "2", "--nodes", "1,2,8", "--ranks-per-node", "2",
         "--latency", "10us", "--bandwidth", "1Gbit", "--memory-bandwidth", "10GB", "--compression", "bf16",
         "--json", str(out), "--save-profile", str(saved), *plot],
        60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mlp: 8 gradients of 2.255 MB" in done.stdout
    assert "latency 10.0 us (given), bandwidth 1 Gbit/s each way per node (given)" in done.stdout
    assert not [line for line in done.stdout.splitlines() if line != line.rstrip()]
    found = json.loads(out.read_text())
    assert found["origin"] == {
        "latency": "given", "bandwidth": "given", "node_latency": "assumed", "memory_bandwidth": "given",
        "overhead": "assumed",
    }  # fmt: skip
    assert [row["nodes"] for row in found["predictions"]] == [1, 2, 8]
    assert [sum(b["nbytes"] for b in row["buckets"]) for row in found["predictions"]] == [2 * 563_722] * 3
    profile = read_profile(saved)
    for row in found["predictions"]:
        again = predict(profile, Setting(row["nodes"], 2, Read(**found["machine"]), True), row["threshold"])
        assert again.step == pytest.approx(row["step"])
        assert row["best"]["step"] <= 1.001 * row["step"]
    if plot:
        assert "<svg" in picture.read_text()


PLANS = """
import sys
import torch
import collective.torch as hvd
from collective.bench.job import Job
from collective.predict.cli import main
from collective.predict.measure import profile_job
from collective.predict.prediction import plan
from collective.predict.training import Training

class Net(torch.nn.Module):
    def __init__(self):  # in another order than forward has, and with one that is never used
        super().__init__()
        for name in ("d", "a", "unused", "c", "b"):
            setattr(self, name, torch.nn.Linear(100, 100))
    def forward(self, x):
        return self.d(self.c(self.b(self.a(x))))

def make():
    net = Net()
    x = torch.ones(3, 100)
    return Training(net, torch.optim.SGD(net.parameters(), lr=0.1), lambda: net(x).sum())

hvd.init()
threshold = 100_000
predicted = plan(profile_job(Job.start(), make, "net", 2).gradients, threshold)
net, sgd, loss = make()
optimizer = hvd.DistributedOptimizer(sgd, net.named_parameters())
loss().backward()
optimizer.step()
real = [[slot.name for slot in bucket.slots] for bucket in optimizer._reducer._rounds.plan.buckets]
assert len(real) > 2, real
assert [[gradient.name for gradient in members] for members in predicted] == real, (predicted, real)
print("the plans are alike")
main(sys.argv[1:])
"""


@needs_torch
@needs_rich
def test_two_ranks_plan_as_the_reducer_does_then_measure_and_train(tmp_path: Path) -> None:
    """In one job, since most of its time is spent on starting it."""
    out = tmp_path / "out.json"
    arguments = ["--model", "mlp", "--steps", "2", "--measure", "--json", str(out)]
    done = run_ranks(2, ["-c", PLANS, *arguments], 100, env={"COLLECTIVE_FUSION_THRESHOLD": "100000"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the plans are alike") == 2
    assert done.stdout.count("predicted and measured, 1 node of 2 ranks") == 1
    found = json.loads(out.read_text())
    assert (found["origin"]["node_latency"], found["origin"]["memory_bandwidth"]) == ("measured", "measured")
    assert len(found["sweep"]["on a node"]) > 3
    assert len(found["measured"]["local"]) == len(found["measured"]["distributed"]) == 2
    (row,) = found["predictions"]
    assert (row["nodes"], row["ranks_per_node"], row["threshold"]) == (1, 2, 100_000)
