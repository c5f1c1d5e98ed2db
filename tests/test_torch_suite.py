"""Some of torch's own tests of a torch.distributed backend. `make torch-suite` runs all of them."""

import importlib.util
import json
from pathlib import Path

import pytest

from harness.mpirun import run_ranks

# Of each kind one or two: objects, groups, reductions, movement, pairs, DDP on the CPU.
AS_GLOO = [
    "test_all_gather_complex",
    "test_all_gather_object_subgroup",
    "test_all_reduce_coalesced_full_group_sum",
    "test_all_reduce_sum_async",
    "test_barrier_full_group",
    "test_batch_isend_irecv_gloo",
    "test_ddp_create_graph",
    "test_ddp_logging_data_cpu",
    "test_gather",
    "test_get_backend",
    "test_get_future",
    "test_reduce_full_group_max",
    "test_scatter_object_list",
    "test_send_recv_any_source",
    "test_sparse_all_reduce_sum",
]
# What gloo's list leaves out.
AS_MPI = [
    "test_all_to_all_complex",
    "test_all_to_all_single_unequal_split_group",
    "test_broadcast_group",
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.skipif(importlib.util.find_spec("expecttest") is None, reason="torch's tests need expecttest")
def test_a_choice_of_them_passes(tmp_path: Path) -> None:
    for like, tests in (("gloo", AS_GLOO), ("mpi", AS_MPI)):
        file = tmp_path / like
        options = [part for test in tests for part in ("--test", test)]
        command = ["-m", "torch_suite", "--like", like, "--json", file, *options]
        done = run_ranks(3, command, timeout=200, cwd=Path(__file__).parent)
        assert done.returncode == 0, done.stdout + done.stderr
        outcomes = {outcome["test"]: outcome["outcome"] for outcome in json.loads(file.read_text())["collective"]}
        assert outcomes == dict.fromkeys(tests, "passed"), done.stdout
