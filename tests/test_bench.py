"""The benchmark: that a run measures what was asked for and reports it; never how long anything took."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import Cluster, why_not
from collective.bench.buffers import check
from collective.bench.cli import parse_bytes, parse_sizes
from collective.bench.resnet50 import gradient_shapes
from collective.bench.results import Result, read_json, write_json
from collective.bench.sizes import format_bytes
from collective.bench.units import parse_rate
from harness.mpirun import run_ranks
from test_device import stand_in  # noqa: F401

needs_rich = pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="needs rich")
WHY_NO_CLUSTER = why_not()
needs_cluster = pytest.mark.skipif(bool(WHY_NO_CLUSTER), reason=f"no cluster here: {WHY_NO_CLUSTER}")
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")


def bench(size: int, *arguments: str | Path, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
    return run_ranks(size, ["-m", "collective.bench", "--repeat", "2", *arguments], timeout)


def measured(file: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = json.loads(file.read_text())["results"]
    return {(row["workload"], row["case"], row["contender"]): row for row in rows}


def test_sizes_are_numbers_and_ranges() -> None:
    assert parse_bytes("8") == 8
    assert parse_bytes("4K") == parse_bytes("4KiB") == 4096
    assert parse_sizes("1M,8:64,1K:64K:8") == [8, 16, 32, 64, 1024, 8192, 65536, 1 << 20]
    for wrong in ("", "0", "8:4", "1K:1M:1", "8:16:2:2", "1T", "-8"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_sizes(wrong)


def test_link_rates_are_bits_as_in_tc() -> None:
    assert parse_rate("1gbit") == parse_rate("1000mbit") == parse_rate("1Gbit/s") == 125e6
    assert parse_rate("2.5Gbit") == 312.5e6
    assert parse_rate("64kbit") == 8000
    assert parse_rate("800bit") == 100
    for wrong in ("", "0gbit", "1", "1g", "1gb", "1gibit", "-1gbit", "1gbit/h"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a rate"):
            parse_rate(wrong)


def test_sizes_are_printed_as_they_are_given() -> None:
    assert [format_bytes(n) for n in (8, 1024, 1536, 64 << 20, 1 << 30)] == [
        "8 B", "1 KiB", "1.5 KiB", "64 MiB", "1 GiB",
    ]  # fmt: skip


def test_resnet50_has_161_gradients_of_102_mb() -> None:
    shapes = dict(gradient_shapes())
    assert len(shapes) == 161
    elements = 0
    for shape in shapes.values():
        count = 1
        for extent in shape:
            count *= extent
        elements += count
    assert elements == 25_557_032


@needs_torch
def test_the_network_that_is_trained_has_these_gradients() -> None:
    from collective.bench.models import ResNet50

    assert [(name, tuple(p.shape)) for name, p in ResNet50().named_parameters()] == gradient_shapes()


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = [
        Result("latency", "8 B", "ours", [3e-6, 1e-6, 2e-6], nbytes=8),
        Result("idle", "10 s", "ours", [0.5], "%"),
    ]
    write_json(tmp_path / "run.json", {"ranks": 2}, ["a note"], results)
    header, medians = read_json(tmp_path / "run.json")
    assert header == {"ranks": 2}
    assert medians == {("latency", "8 B", "ours"): 2e-6, ("idle", "10 s", "ours"): 0.5}
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json"):
        read_json(tmp_path / "other.json")


@pytest.mark.parametrize("fault", [None, "second call does nothing", "never sums", "chunk from the wrong place"])
def test_a_contender_that_does_not_sum_is_not_timed(fault: str | None) -> None:
    array = np.zeros(1000, np.float32)

    def run(count: int) -> None:  # as on rank 0 of 2, where rank 1 has twice as much before the first sum
        array[:] *= 3
        if fault != "second call does nothing":
            array[:] *= 2 ** (count - 1)
        if fault == "never sums":
            array[:] /= 6
        if fault == "chunk from the wrong place":
            array[:] = np.roll(array, 100)

    if fault is None:
        check([array], run, 0, 2, "it")
        assert not array.any()
    else:
        with pytest.raises(ArithmeticError, match="it: two sums over 2 ranks are off"):
            check([array], run, 0, 2, "it")


@needs_rich
@pytest.mark.parametrize("size", [2, 3])
def test_every_contender_is_measured_at_every_size(size: int, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    done = bench(size, "--sizes", "8,1K,64K,5M", "--workloads", "latency,bandwidth", "--json", file)
    assert done.returncode == 0, done.stderr
    rows = measured(file)
    expected = {"ours", "ours fp16", "ours bf16", "mpi", "memcpy"}
    warm = set()  # a bucket stays where it is
    if importlib.util.find_spec("torch"):
        expected |= {"gloo", "ours c10d"}
        warm.add("ours views")
    for workload, case in [("latency", "8 B"), ("latency", "1 KiB"), ("bandwidth", "64 KiB warm"),
                           ("bandwidth", "64 KiB cold")]:  # fmt: skip
        assert {key[2] for key in rows if key[:2] == (workload, case)} - warm == expected
        assert any(key[2] in warm for key in rows if key[:2] == (workload, case)) == bool(warm and "cold" not in case)
    largest = {key[2] for key in rows if key[1].startswith("5 MiB")}
    assert largest - warm == expected | {"mpi-pieces"}
    for row in rows.values():
        assert len(row["samples"]) == 2
        assert 0 < row["min"] <= row["median"]
    for title in ("latency: us", "bandwidth: us", "bandwidth: GB/s"):
        assert done.stdout.count(title) == 1  # rank 0 alone reports
    assert f"{size} ranks on 1 node" in done.stdout
    assert not [line for line in done.stdout.splitlines() if line != line.rstrip()]


@needs_rich
@needs_torch
def test_other_dtypes_leave_out_who_has_them_not(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    done = bench(
        2, "--sizes", "1K", "--workloads", "latency", "--dtype", "float16,bfloat16", "--peers", "mpi,gloo,bf16",
        "--json", file,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(measured(file)) == {
        ("latency", f"1 KiB {dtype}", contender) for dtype in ("float16", "bfloat16") for contender in ("ours", "gloo")
    }
    assert "note: mpi has no bfloat16" in done.stdout


@needs_rich
@needs_torch
@pytest.mark.slow
def test_training_workloads(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    done = bench(
        2, "--workloads", "idle,resnet50,step,overlap", "--idle-seconds", "0.2", "--peers", "gloo,memcpy",
        "--repeat", "1", "--json", file, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = measured(file)
    gradients = "161 tensors, 102 MB"
    overlap = ("local", "communication", "step", "CPU added", "hidden")
    assert set(rows) == {
        ("idle", "0.2 s", "ours"),
        *(("resnet50", gradients, name) for name in ("ours", "ours buckets", "ours views", "gloo", "memcpy")),
        *(
            ("step", "ResNet-50, batch 4", name)
            for name in ("local", "ours", "ours views", "ours bf16", "ddp gloo", "ddp ours")
        ),
        *(("overlap", case, name) for case in ("computing", "waiting") for name in overlap),
    }
    assert {row["unit"] for key, row in rows.items() if key[2] == "hidden"} == {"%"}
    # Waiting takes longer than what it is to hide.
    assert rows["overlap", "waiting", "local"]["median"] > rows["overlap", "computing", "communication"]["median"]


@needs_rich
@pytest.mark.slow
def test_devices(tmp_path: Path, stand_in: dict[str, str]) -> None:  # noqa: F811
    """On the stand-in, whose times mean nothing."""
    file = tmp_path / "run.json"
    arguments = ["--workloads", "devices", "--sizes", "1K,300K", "--repeat", "1", "--json", file]
    done = run_ranks(2, ["-m", "collective.bench", *arguments], 120, env=stand_in)
    assert done.returncode == 0, done.stderr
    rows = measured(file)
    contenders = ("ours", "ours fp16", "host + mpi")
    assert {key for key in rows if key[0] == "devices"} == {
        ("devices", case, name) for case in ("1 KiB", "300 KiB") for name in contenders
    }
    assert ("kernels", "pack 161 gradients", "ours") in rows
    assert "of a copy's" in done.stdout
    assert "note: devices: stand-in 0 on rank 0" in done.stdout


@needs_rich
@pytest.mark.parametrize("size", [1, 2])
def test_one_node_has_no_wire(size: int, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    done = bench(size, "--workloads", "wire", "--json", file)
    assert done.returncode == 0, done.stderr
    assert "note: wire is left out: all ranks are on one node" in done.stdout
    assert measured(file) == {}


@needs_rich
@needs_torch
@needs_cluster
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "link"), [([1, 1], None), ([2, 1, 2], "1gbit")], ids=str)
def test_wire(ranks: list[int], link: str | None, tmp_path: Path) -> None:
    """On hosts with a link each, which is given here or measured."""
    file = tmp_path / "run.json"
    arguments = ["--workloads", "wire", "--sizes", "1K,1M", "--repeat", "2", "--json", str(file)]
    if link is not None:
        arguments += ["--link-rate", link]
    with Cluster(ranks) as cluster:
        job = cluster.start([sys.executable, "-m", "collective.bench", *arguments], stdout=subprocess.PIPE)
        output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    rows = measured(file)
    contenders = {"ours", "ours views", "ours c10d", "ours fp16", "mpi", "gloo"} | (
        {"ours flat"} if max(ranks) > 1 else set()
    )
    n = len(ranks)
    assert set(rows) == {
        ("wire link", f"{n} nodes", "mpi messages" if link is None else "given"),
        *(("wire", size, name) for size in ("1 KiB", "1 MiB") for name in ({"ceiling"} | contenders)),
        *(("wire bytes", "1 MiB", name) for name in contenders),
        *(
            ("wire step", case, name)
            for case in ("time", "CPU")
            for name in ("communication", "local", "ours", "ours fp16", "ddp gloo", "mpi")
        ),
    }
    assert all(row["median"] > 0 for row in rows.values())
    if link is not None:
        least = 2 * (n - 1) / n * (1 << 20)
        assert rows["wire", "1 MiB", "ceiling"]["median"] == pytest.approx(least / 125e6)
    # On average nodes cannot send less, and with our buckets none sends more.
    for name in contenders:
        multiples = rows["wire bytes", "1 MiB", name]["samples"]
        assert len(multiples) == n
        assert sum(multiples) / n > (0.5 if name == "ours fp16" else 1.0), name
    assert max(rows["wire bytes", "1 MiB", "ours views"]["samples"]) < 1.3
    assert max(rows["wire bytes", "1 MiB", "ours fp16"]["samples"]) < 1.3
    # The tables are there, and their shares follow from the times.
    assert ("note: ours flat is left out" in output) is (max(ranks) == 1)
    shares = output.partition("% of the ceiling's speed")[2].partition("ceiling:")[0]
    (cells,) = (line.split()[2:] for line in shares.splitlines() if line.split()[:2] == ["1", "MiB"])
    ceiling, ours = (rows["wire", "1 MiB", name]["median"] for name in ("ceiling", "ours"))
    assert cells[0] == f"{100 * ceiling / ours:.1f}"
    assert len(cells) == len(contenders) + 1
    for title in (
        f"wire: {n} nodes, each link",
        "wire: time of",
        "wire: bytes sent for 1 MiB",
        "wire: a training step",
    ):
        assert output.count(title) == 1  # rank 0 alone reports


@needs_rich
def test_a_later_run_is_compared_row_by_row(tmp_path: Path) -> None:
    old, picture = tmp_path / "old.json", tmp_path / "sizes.svg"
    common = ["--workloads", "latency", "--peers", "memcpy"]
    first = bench(2, "--sizes", "8,64", *common, "--json", old)
    assert first.returncode == 0, first.stderr
    plot = ["--plot", picture] if importlib.util.find_spec("matplotlib") else []
    second = bench(2, "--sizes", "64,1K", *common, "--compare", old, *plot)
    assert second.returncode == 0, second.stderr
    table = second.stdout.partition("now against")[2]
    rows = [line.split() for line in table.splitlines() if line.split()[:1] == ["latency"]]
    assert [row[1:4] for row in rows] == [
        ["64", "B", "ours"], ["64", "B", "memcpy"], ["1", "KiB", "ours"], ["1", "KiB", "memcpy"],
    ]  # fmt: skip
    assert [row[-1] == "-" for row in rows] == [False, False, True, True]
    assert f"only in {old}: latency 8 B ours" in table
    if plot:
        assert "<svg" in picture.read_text()


@needs_rich
def test_a_wrong_option_is_told_once_and_ends_every_rank() -> None:
    done = bench(2, "--workloads", "latncy", timeout=60)
    assert done.returncode != 0
    assert done.stderr.count("latncy: none of idle, latency") == 1
