"""Several nodes with several ranks each, on a cluster of network namespaces: see tests/cluster."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster import Cluster, why_not

WHY_NOT = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=f"no cluster here: {WHY_NOT}")]

# Of what ranks do together, whatever carries it.
FILES = [
    "join",
    "optimizer",
    "optimizer_accumulation",
    "optimizer_views",
    "optimizer_parameters",
    "process_sets",
    "sparse",
]


def run(cluster: Cluster, *arguments: str, timeout: float = 200) -> str:
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
