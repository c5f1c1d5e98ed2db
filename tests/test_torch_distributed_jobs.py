"""The backend of torch.distributed in jobs of its own: what hangs is explained, and what is started wrongly."""

import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch.distributed as dist

import collective.torch  # noqa: F401
from harness.mpirun import environment, run_ranks

JOB = """
import sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
import collective
import collective.torch

dist.init_process_group("collective", timeout=timedelta(seconds=3))
rank, size = dist.get_rank(), dist.get_world_size()
last = rank == size - 1
begin = time.monotonic()
try:
    {body}
except RuntimeError as error:
    print(rank, type(error).__name__, *str(error).split(), flush=True)
else:
    print(f"{{rank}} done", flush=True)
"""

BODIES = {
    "shape": (
        "dist.all_reduce(torch.ones(3 + last))",
        "MismatchError",
        r"shape differs: \(3,\) on .*; \(4,\) on rank {last}",
    ),
    "operator": (
        "dist.all_reduce(torch.ones(3), dist.ReduceOp.MAX if last else dist.ReduceOp.SUM)",
        "MismatchError",
        "reduction differs: Sum on .*; Max on rank {last}",
    ),
    "late": (
        "time.sleep(5) if last else dist.all_reduce(torch.ones(3))",
        "CollectiveTimeoutError",
        "rank {last} did not start it.* did not finish within the timeout of 3.0 s",
    ),
    "gone": ("None if last else dist.all_reduce(torch.ones(3))", "ShutdownError", "rank {last} has shut down"),
    "ddp": (
        "m = torch.nn.Linear(3, 3); m = torch.nn.parallel.DistributedDataParallel(m); "
        "last or m(torch.ones(3)).sum().backward()",
        "RuntimeError",
        "rank {last} has shut down",
    ),
    "splits": (
        "dist.all_to_all_single(torch.empty(size + last), torch.ones(size), [1] * (size - 1) + [1 + last], [1] * size)",
        "MismatchError",
        "sends 1 elements to a rank that expects 2",
    ),
}


@pytest.mark.parametrize("what", BODIES)
@pytest.mark.parametrize("shared_memory", ["1", "0"], ids=["memory", "messages"])
def test_hangs_are_explained(what: str, shared_memory: str) -> None:
    """Whatever carries the data, no rank waits for ever, and the error names who does what."""
    body, kind, pattern = BODIES[what]
    env = {"COLLECTIVE_SHARED_MEMORY": shared_memory}
    done = run_ranks(3, ["-c", JOB.format(body=body)], 60, env=env)
    said = sorted(line for line in done.stdout.splitlines() if line[:1] in "012")
    assert len(said) == 3, done.stdout + done.stderr
    for rank, line in enumerate(said):
        if rank == 2 and what in ("late", "gone", "ddp"):
            assert line == "2 done"
        else:
            assert re.match(rf"{rank} {kind} .*default process group: \w+ 'call .*{pattern.format(last=2)}", line), line


MIXED = """
import sys
import torch
import torch.distributed as dist
import collective.torch

dist.init_process_group(sys.argv[1])
rank, size = dist.get_rank(), dist.get_world_size()
for group in (None, dist.new_group(list(range(size)))):
    x = torch.ones(3)
    dist.all_reduce(x, group=group)
    assert x.tolist() == [size] * 3
    everyone = [None] * size
    dist.all_gather_object(everyone, rank, group=group)
    assert everyone == list(range(size))
    dist.barrier(group=group)
    print(rank, type((group or dist.group.WORLD)._get_backend(torch.device("cpu"))).__name__, flush=True)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("backend", "of_the_cpu"),
    [("cpu:collective,cuda:gloo", "MixedProcessGroup"), ("cpu:gloo,cuda:collective", "ProcessGroupGloo")],
)
def test_a_backend_for_each_kind_of_device(backend: str, of_the_cpu: str) -> None:
    done = run_ranks(2, ["-c", MIXED, backend], 60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(f"{rank} {of_the_cpu}" for rank in (0, 0, 1, 1))


@pytest.mark.parametrize(
    ("variables", "arguments", "pattern"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "",
            "alone in MPI_COMM_WORLD",
        ),
        ({}, ", rank=0, world_size=3, store=dist.HashStore()", "rank 0 of 3 .* MPI that it is rank 0 of 1"),
    ],
    ids=["variables", "arguments"],
)
def test_one_process_where_more_are_expected(variables: dict[str, str], arguments: str, pattern: str) -> None:
    code = f"import torch.distributed as dist, collective.torch\ndist.init_process_group('collective'{arguments})"
    env = {**environment(), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert re.search(pattern, done.stderr), done.stderr
    assert "mpirun" in done.stderr


def test_the_entry_point_is_the_registration() -> None:
    """torch 2.14 finds the backend by it."""
    (found,) = entry_points(group="torch.distributed.backends", name="collective")
    found.load()()
    assert "collective" in dist.Backend.backend_list
