"""Settings from the environment: what they may be, how they are called, what they do."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

import collective
from collective import Sum
from collective.config import Config, environment_outside_the_job
from mpi_plugin import World
from mpirun import environment


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without what the developer has set."""
    for name in list(os.environ):
        if name.startswith(("COLLECTIVE_", "HOROVOD_")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_defaults(clean: pytest.MonkeyPatch) -> None:
    config = Config.from_environment()
    assert (config.timeout, config.stall_warning, config.fusion_threshold) == (300.0, 10.0, 8 << 20)


@pytest.mark.parametrize(
    ("variables", "field", "value"),
    [
        ({"COLLECTIVE_TIMEOUT": "1.5"}, "timeout", 1.5),
        ({"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "60"}, "timeout", 60.0),
        ({"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "0"}, "timeout", 300.0),
        ({"COLLECTIVE_TIMEOUT": "7", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "60"}, "timeout", 7.0),
        ({"COLLECTIVE_STALL_WARNING": "0"}, "stall_warning", math.inf),
        ({"HOROVOD_STALL_CHECK_TIME_SECONDS": "30"}, "stall_warning", 30.0),
        ({"HOROVOD_STALL_CHECK_DISABLE": "1"}, "stall_warning", math.inf),
        ({"HOROVOD_STALL_CHECK_DISABLE": "1", "COLLECTIVE_STALL_WARNING": "5"}, "stall_warning", 5.0),
        ({"COLLECTIVE_FUSION_THRESHOLD": "0"}, "fusion_threshold", 0),
        ({"HOROVOD_FUSION_THRESHOLD": "1048576"}, "fusion_threshold", 1 << 20),
        ({}, "cuda_aware", None),
        ({"COLLECTIVE_CUDA_AWARE": "0"}, "cuda_aware", False),
        ({"COLLECTIVE_CUDA_AWARE": "1"}, "cuda_aware", True),
        ({"HOROVOD_CYCLE_TIME": "3", "HOROVOD_CACHE_CAPACITY": "no number"}, "timeout", 300.0),
    ],
)
def test_values(clean: pytest.MonkeyPatch, variables: dict[str, str], field: str, value: object) -> None:
    """Ours, and those by which Horovod knows them; ours win, and those that have no meaning here are ignored."""
    for name, text in variables.items():
        clean.setenv(name, text)
    assert getattr(Config.from_environment(), field) == value


def test_wrong_values_are_told_by_name(clean: pytest.MonkeyPatch) -> None:
    wrong = {
        "COLLECTIVE_TIMEOUT": ["soon", "0", "-1", "", "nan"],
        "COLLECTIVE_STALL_WARNING": ["1s", "-0.5"],
        "COLLECTIVE_FUSION_THRESHOLD": ["64MB", "1.5", "-1"],
        "COLLECTIVE_SHARED_MEMORY": ["2", "never"],
        "COLLECTIVE_CUDA_AWARE": ["2", "maybe", ""],
        "COLLECTIVE_TIME_OUT": ["30"],  # unknown, since misspelt
    }
    for name, texts in wrong.items():
        for text in texts:
            with clean.context() as patch:
                patch.setenv(name, text)
                with pytest.raises(collective.InvalidArgumentError, match=name):
                    collective.init()
    assert "mpi4py.MPI" not in sys.modules or not sys.modules["mpi4py.MPI"].Is_initialized()


def test_the_environment_for_another_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this job's launcher, with the user's choice of transports."""
    stays = ["OMPI_MCA_pml", "OMPI_ALLOW_RUN_AS_ROOT", "PRTE_MCA_prte_if_include", "UCX_TLS", "CUDA_VISIBLE_DEVICES"]
    goes = ["OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri", "OMPI_MCA_num_procs", "PRTE_LAUNCHED", "PMIX_RANK"]
    goes += ["PMI_FD", "PMI2_RANK", "MPI_LOCALRANKID", "HYDI_CONTROL_FD", "SLURM_JOB_ID", "SLURMD_NODENAME"]
    for name in stays + goes:
        monkeypatch.setenv(name, "1")
    left = environment_outside_the_job()
    assert [name for name in stays + goes if name in left] == stays


@pytest.mark.ranks(2, 3)
def test_fusion_threshold(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, or 0, which is never to fuse: the results are the same."""
    collective.shutdown()
    for threshold in ("0", "1", "100", "1000000000"):
        monkeypatch.setenv("COLLECTIVE_FUSION_THRESHOLD", threshold)
        collective.init()
        handles = [collective.allreduce_async(np.full(n, n), Sum, name=f"small.{n}") for n in range(50)]
        for n, handle in enumerate(handles):
            np.testing.assert_array_equal(handle.wait(), np.full(n, n * world.size))
        collective.shutdown()


def test_mpi_without_threads_and_a_foreign_launcher() -> None:
    def fails(code: str, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment(), **env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert "collective.errors.InvalidArgumentError" in done.stderr
        return done.stderr

    told = fails("import mpi4py; mpi4py.rc.threads = False; import collective; collective.init()")
    assert "MPI_THREAD_MULTIPLE" in told
    assert "PMI_SIZE=4" in fails("import collective; collective.init()", PMI_SIZE="4")
