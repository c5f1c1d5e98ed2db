"""Where the ranks of a node can, and cannot, share memory: in namespaces of the kernel."""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from harness.mpirun import run_ranks

# 64 MiB through the lane of the world, another through that of a process set, and an optimizer's buckets.
SCRIPT = """
import re, sys
import numpy as np, torch
import collective, collective.torch as hvd

hvd.init()
rank, size = hvd.rank(), hvd.size()
x = np.arange(16 << 20, dtype=np.float32) % 1000 + rank
assert (collective.allreduce(x, collective.Sum) == size * (x - rank) + size * (size - 1) // 2).all()
pair = hvd.add_process_set([0, 1])
if rank < 2:
    assert (collective.allreduce(x, collective.Sum, process_set=pair) == 2 * (x - rank) + 1).all()

model = torch.nn.Linear(4096, 4096)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
for _ in range(3):
    optimizer.zero_grad()
    model(torch.full((2, 4096), rank + 1.0)).sum().backward()
    optimizer.step()
    want = 2 * (size + 1) / 2
    assert (model.weight.grad == want).all(), model.weight.grad
mapped = 0
for line in open("/proc/self/maps"):
    begin, end, *rest = re.split("[- ]", line)
    mapped += (int(end, 16) - int(begin, 16)) * ("memfd:" in line)
print(f"rank {rank} shares {mapped >> 20} MiB", flush=True)
hvd.shutdown()
"""


def unshare(*options: str) -> list[str]:
    command = ["unshare", *options]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on PATH (util-linux)")
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=60, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no namespaces for this user: {tried.stderr.strip()}")
    return command


def run(
    tmp_path: Path,
    arguments: Sequence[str | Path] = (),
    program: str = sys.executable,
    under: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> tuple[str, str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = run_ranks(3, [*arguments, script], timeout=120, program=program, under=under, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, result.stderr


def test_a_small_dev_shm_is_no_limit(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    under = [*unshare("--mount"), "sh", "-c", mount, "sh"]
    stdout, stderr = run(tmp_path, under=under)
    assert "cannot share memory" not in stderr
    for rank in range(3):
        shared = int(stdout.partition(f"rank {rank} shares ")[2].split()[0])
        assert shared > 3 * 64, stdout  # of each rank the buckets of 64 MiB


def test_ranks_in_separate_pid_namespaces_send_messages_and_warn_once(tmp_path: Path) -> None:
    options = ["--pid", "--fork", "--kill-child"]
    unshare(*options)
    # Shared memory of the MPI itself trusts process numbers.
    env = {"OMPI_MCA_btl": "self,tcp", "OMPI_MCA_pml": "ob1", "MPIR_CVAR_NOLOCAL": "1"}
    stdout, stderr = run(tmp_path, [*options, sys.executable], program="unshare", env=env)
    assert stderr.count("cannot share memory") == 1, stderr
    assert "rank 0: the ranks of this node use MPI messages" in stderr
    for rank in range(3):
        assert f"rank {rank} shares 0 MiB" in stdout
