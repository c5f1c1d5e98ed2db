"""Several nodes with several ranks each, on a cluster of network namespaces: see tests/cluster."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import Cluster, why_not
from traces import Trace

WHY_NOT = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=f"no cluster here: {WHY_NOT}")]

# Of what ranks do together, whatever carries it.
FILES = [
    "adasum",
    "allgather",
    "allreduce",
    "broadcast",
    "compression",
    "join",
    "movement",
    "objects",
    "optimizer",
    "optimizer_accumulation",
    "optimizer_views",
    "optimizer_parameters",
    "process_sets",
    "reductions",
    "sparse",
    "sync_batch_norm",
    "torch_distributed",
    "torch_ops",
]


def run(cluster: Cluster, *arguments: str, timeout: float = 400) -> str:
    """The output of a job that must succeed."""
    job = cluster.start([sys.executable, *arguments], stdout=subprocess.PIPE)
    output, _ = job.communicate(timeout=timeout)
    assert job.returncode == 0, output
    return output


@pytest.mark.parametrize("ranks", [[2, 2], [1, 2, 1]], ids=str)
def test_what_ranks_do_together(ranks: list[int]) -> None:
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in FILES]
    with Cluster(ranks, rate=None) as cluster:
        assert " passed" in run(cluster, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files)


@pytest.mark.parametrize("options", [[], ["--map-by", "node"]], ids=["by slot", "by node"])
def test_each_byte_crosses_the_network_once_per_node(options: list[str]) -> None:
    """2 (n-1)/n N bytes leave each of n nodes for a bucket of N bytes, wherever ranks are placed."""
    code = """
import torch
import collective.torch as hvd
hvd.init()
assert hvd.local_size() == 2 and hvd.cross_size() == 2
parameters = [torch.nn.Parameter(torch.zeros(1 << 20)) for _ in range(4)]
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), op=hvd.Sum)
for step in range(6):
    for n, p in enumerate(parameters):
        p.grad = torch.full((1 << 20,), float(hvd.rank() + n))
    optimizer.step()
    optimizer.zero_grad()
assert [p.unique().tolist() for p in parameters] == [[-6.0 * (6 + 4 * n)] for n in range(4)]
"""
    with Cluster([2, 2], rate=None) as cluster:
        job = cluster.start([sys.executable, "-c", code], options=options, stdout=subprocess.PIPE)
        output, _ = job.communicate(timeout=100)
        assert job.returncode == 0, output
        for host in range(2):
            share = cluster.bytes_sent(host) / (6 * 2 * (2 - 1) / 2 * (16 << 20))
            assert 1.0 < share < 1.03, share  # frames, acknowledgements, and the start of the job


@pytest.mark.parametrize("options", [[], ["--map-by", "node"]], ids=["by slot", "by node"])
def test_a_reduce_scatter_sends_half_of_that(options: list[str]) -> None:
    """(n-1)/n N bytes leave each of n nodes, whose ranks have added theirs before; parts may differ in length."""
    code = """
import numpy as np
import collective
collective.init()
size, rank = collective.size(), collective.rank()
for rows in (1, 2, 5, 1003, (4 << 20) + 3):
    x = np.arange(rows, dtype=np.float32) % 101 + rank
    whole = size * (np.arange(rows, dtype=np.float32) % 101) + size * (size - 1) / 2
    for _ in range(6 if rows > 2000 else 1):
        part = collective.reducescatter(x, collective.Sum)
        assert np.array_equal(part, np.array_split(whole, size)[rank]), rows
    result = collective.reduce(x[:1000], size - 1, collective.Sum)
    assert (result is None) == (rank != size - 1)
    assert result is None or np.array_equal(result, whole[:1000])
"""
    with Cluster([2, 2], rate=None) as cluster:
        job = cluster.start([sys.executable, "-c", code], options=options, stdout=subprocess.PIPE)
        output, _ = job.communicate(timeout=100)
        assert job.returncode == 0, output
        for host in range(2):
            share = cluster.bytes_sent(host) / (6 * (2 - 1) / 2 * (16 << 20))
            assert 1.0 < share < 1.05, share


def test_the_doctor_looks_at_the_network(tmp_path: Path) -> None:
    """A host whose link is slower than the others' by far is named."""
    file = tmp_path / "found.json"

    def examine() -> dict[str, Any]:
        run(cluster, "-m", "collective.doctor", "--json", str(file), timeout=100)
        content: dict[str, Any] = json.loads(file.read_text())
        assert len(content["measured"]["node_pairs"]) == 6
        assert content["measured"]["node_pairs_left"] == 0
        return content

    with Cluster([1, 1, 1, 1], rate="1gbit") as cluster:
        content = examine()
        texts = {finding["check"]: finding["text"] for finding in content["findings"]}
        assert texts["ranks"].startswith("4 ranks on 4 hosts: host0 1 ")
        assert "10.77.0.1, through host0 eth0, host1 eth0, host2 eth0, host3 eth0" in texts["addresses"]
        assert texts["clocks"].startswith("clocks differ by ")
        assert all(pair["bandwidth"] < 2e8 for pair in content["measured"]["node_pairs"])  # the links': 125 MB/s
        cluster.slow_down(2, "20mbit")
        content = examine()
        warned = [f["text"] for f in content["findings"] if f["check"] == "network" and f["level"] == "warn"]
        assert sum("rank 2 (host2)" in text for text in warned) == 3, warned
        assert content["measured"]["left_out"].startswith("the slowest link would take ")


def test_a_trace_of_several_hosts(tmp_path: Path) -> None:
    """Which have one clock, in truth: what is measured of theirs is as exact as it says."""
    code = """
import time
import torch
import collective.torch as hvd
hvd.init()
hvd.start_trace(PATH)
parameters = [torch.nn.Parameter(torch.zeros(1 << 16)) for _ in range(4)]
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), op=hvd.Sum)
for step in range(6):
    for n, p in enumerate(parameters):
        p.grad = torch.full((1 << 16,), float(hvd.rank() + n))
    if hvd.rank() == 2:
        time.sleep(0.2)
    optimizer.step()
    optimizer.zero_grad()
    hvd.allreduce(torch.ones(3), name="loss")
hvd.shutdown()
"""
    path = tmp_path / "t.json"
    with Cluster([2, 2], rate=None) as cluster:
        run(cluster, "-c", code.replace("PATH", repr(str(path))), timeout=100)
    assert [file.name for file in tmp_path.iterdir()] == ["t.json"]
    trace = Trace(path)
    assert trace.processes == ["rank 0 on host0", "rank 1 on host0", "rank 2 on host1", "rank 3 on host1"]
    assert trace.about["remarks"] == []
    readings = [reading for found in trace.about["clocks"].values() for reading in found]
    assert len(readings) == 2 * 4
    assert all(abs(reading["ahead"]) <= reading["delay"] / 2 + 1e-3 for reading in readings)
    assert trace.about["clocks_agree_to_us"] > 0
    losses = [event for event in trace.slices if (event["name"], event["cat"]) == ("loss", "wait")]
    assert len(losses) == 4 * 6
    buckets = [event for event in trace.slices if event["args"]["kind"] == "bucket"]
    assert len(buckets) >= 4 * 5
    assert all("last_to_come" in event["args"] for event in buckets)
    assert all(len(trace.names(rank, "step")) == 6 for rank in range(4))


def start_training(cluster: Cluster, steps: int, pause: float, **env: str) -> subprocess.Popen[str]:
    """Once it has made its first steps."""
    script = Path(__file__).with_name("cluster_training.py")
    job = cluster.start([sys.executable, str(script), str(steps), str(pause)], env=env, stdout=subprocess.PIPE)
    assert job.stdout is not None
    watchdog = threading.Timer(60, job.kill)
    watchdog.start()
    for line in job.stdout:
        if line == "step 2\n":
            watchdog.cancel()
            return job
    watchdog.cancel()
    raise AssertionError("the job ended before its third step")


def test_a_link_that_is_cut_for_two_seconds() -> None:
    """Training goes on, with the right result, and the ranks say that they have waited."""
    with Cluster([1, 1], rate=None) as cluster:
        job = start_training(cluster, 100, 0.02, COLLECTIVE_STALL_WARNING="0.5", COLLECTIVE_TIMEOUT="60")
        cluster.cut(1)
        time.sleep(2)
        cluster.restore(1)
        output, _ = job.communicate(timeout=100)
    assert job.returncode == 0, output
    for rank in range(2):
        assert f"rank {rank}: [[-100.0], [-300.0], [-500.0], [-700.0]]" in output
    assert "stalled for " in output


def test_a_host_that_is_gone() -> None:
    """Every rank on the other hosts ends with an error that names it and its ranks.

    mpirun does not end by itself when it hears nothing from a host; docs/troubleshooting.md tells what to set.
    """
    with Cluster([2, 2], rate=None) as cluster:
        job = start_training(cluster, 10_000, 0.02, COLLECTIVE_STALL_WARNING="1", COLLECTIVE_TIMEOUT="4")
        cluster.cut(1)
        end = time.monotonic() + 30
        while (left := ranks_on(cluster, 0)) and time.monotonic() < end:
            time.sleep(0.1)
    output, _ = job.communicate(timeout=30)
    assert left == [], output
    assert "uncaught CollectiveTimeoutError" in output, output
    assert "ranks 2, 3 (host1) did not answer" in output, output


def ranks_on(cluster: Cluster, host: int) -> list[str]:
    """The commands of the ranks that live there."""
    commands = []
    for pid in cluster.processes(host):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            commands.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
    return [command for command in commands if command.startswith(sys.executable)]
