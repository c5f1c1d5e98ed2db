"""Settings from the environment: what they may be, how they are called, what they do."""

import math
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

import collective
from collective import Sum, launcher
from collective.config import Config, LogLevel, environment_outside_the_job
from harness.mpirun import environment
from harness.plugin import World


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
        ({"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "0"}, "timeout", math.inf),
        ({"COLLECTIVE_TIMEOUT": "0"}, "timeout", math.inf),
        ({"COLLECTIVE_TIMEOUT": "inf"}, "timeout", math.inf),
        ({"COLLECTIVE_STALL_WARNING": "inf"}, "stall_warning", math.inf),
        ({}, "log_level", LogLevel.WARNING),
        ({"HOROVOD_LOG_LEVEL": "ERROR"}, "log_level", LogLevel.ERROR),
        ({"HOROVOD_LOG_LEVEL": "trace", "COLLECTIVE_LOG_LEVEL": "fatal"}, "log_level", LogLevel.FATAL),
        ({"COLLECTIVE_TIMEOUT": "7", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "60"}, "timeout", 7.0),
        ({"COLLECTIVE_STALL_WARNING": "0"}, "stall_warning", math.inf),
        ({"HOROVOD_STALL_CHECK_TIME_SECONDS": "30"}, "stall_warning", 30.0),
        ({"HOROVOD_STALL_CHECK_DISABLE": "1"}, "stall_warning", math.inf),
        ({"HOROVOD_STALL_CHECK_DISABLE": "1", "COLLECTIVE_STALL_WARNING": "5"}, "stall_warning", 5.0),
        ({"COLLECTIVE_FUSION_THRESHOLD": "0"}, "fusion_threshold", 0),
        ({"HOROVOD_FUSION_THRESHOLD": "1048576"}, "fusion_threshold", 1 << 20),
        ({}, "stragglers", True),
        ({"COLLECTIVE_STRAGGLERS": "0"}, "stragglers", False),
        ({}, "cuda_aware", None),
        ({"COLLECTIVE_CUDA_AWARE": "0"}, "cuda_aware", False),
        ({"COLLECTIVE_CUDA_AWARE": "1"}, "cuda_aware", True),
        ({}, "trace_steps", None),
        ({"COLLECTIVE_TRACE_STEPS": "100-110"}, "trace_steps", (100, 110)),
        ({"COLLECTIVE_TRACE_STEPS": "7"}, "trace_steps", (7, 7)),
        ({"COLLECTIVE_TRACE_MAX_MB": "2048"}, "trace_max_mb", 2048),
        ({}, "metrics", None),
        ({"COLLECTIVE_METRICS": ""}, "metrics", None),
        ({"COLLECTIVE_METRICS": "9400"}, "metrics", ("127.0.0.1", 9400)),
        ({"COLLECTIVE_METRICS": "0.0.0.0:9400"}, "metrics", ("0.0.0.0", 9400)),
        ({"COLLECTIVE_METRICS": "[::1]:9400"}, "metrics", ("::1", 9400)),
        ({}, "out_of_band", True),
        ({"COLLECTIVE_OUT_OF_BAND": "0"}, "out_of_band", False),
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
        "COLLECTIVE_TIMEOUT": ["soon", "-1", "", "nan", "-inf"],
        "COLLECTIVE_STALL_WARNING": ["1s", "-0.5", "nan"],
        "COLLECTIVE_LOG_LEVEL": ["loud", ""],
        "HOROVOD_LOG_LEVEL": ["3"],
        "COLLECTIVE_FUSION_THRESHOLD": ["64MB", "1.5", "-1"],
        "COLLECTIVE_SHARED_MEMORY": ["2", "never"],
        "COLLECTIVE_CUDA_AWARE": ["2", "maybe", ""],
        "COLLECTIVE_TRACE_STEPS": ["3-2", "-2", "a", "1-2-3"],
        "COLLECTIVE_TRACE_MAX_MB": ["0", "4096", "many"],
        "COLLECTIVE_METRICS": ["on", "0", "65536", "localhost:", "-1", "localhost"],
        "COLLECTIVE_OUT_OF_BAND": ["2", ""],
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
    goes += ["JSM_NAMESPACE_RANK", "COLLECTIVE_RANK_PID"]
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


@pytest.mark.ranks(2)
def test_waiting_for_ever(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No time that the engine computes with overflows: nothing is given up, and no warning comes."""
    collective.shutdown()
    monkeypatch.setenv("COLLECTIVE_TIMEOUT", "inf")
    monkeypatch.setenv("COLLECTIVE_STALL_WARNING", "inf")
    collective.init()
    if world.rank == 0:
        handles = [collective.allreduce_async(np.ones(3), Sum, name="late")]
        handles.append(collective.recv_async(np.zeros(2), 1))
    world.comm.Barrier()
    time.sleep(0.5)  # the engine looks for stalls every tenth of a second
    if world.rank == 1:
        handles = [collective.allreduce_async(np.ones(3), Sum, name="late")]
        handles.append(collective.send_async(np.full(2, 7.0), 0))
    np.testing.assert_array_equal(handles[0].wait(), np.full(3, 2))
    handles[1].wait()
    collective.shutdown()


@pytest.mark.ranks(2)
def test_the_level_of_what_is_printed(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for level, said in (("error", False), ("info", True)):
        collective.shutdown()
        monkeypatch.setenv("HOROVOD_LOG_LEVEL", level)
        monkeypatch.setenv("COLLECTIVE_STALL_WARNING", "0.1")
        collective.init()
        capfd.readouterr()
        if world.rank == 1:
            time.sleep(0.8)
        collective.allreduce(np.ones(1), name="late")
        assert ("stalled" in capfd.readouterr().err) == (said and world.rank == 0)
    collective.shutdown()
    monkeypatch.undo()
    collective.init()


ALONE = "import collective; collective.init(); print(collective.size())"


def alone(code: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """A process that no launcher has started, with these variables."""
    clean = {name: value for name, value in environment().items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("variables", "remedy"),
    [
        ("RANK=0 WORLD_SIZE=4 LOCAL_RANK=0 TORCHELASTIC_RUN_ID=none", "mpirun -np 4 python"),
        ("OMPI_COMM_WORLD_SIZE=1 RANK=0 WORLD_SIZE=4", "torchrun starts no MPI ranks"),
        ("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4", "mpirun -np 4"),
        ("PMI_SIZE=4", "mpirun -np 4"),
        ("MPI_LOCALRANKID=0 MPI_LOCALNRANKS=4", "mpirun -np 4"),
        ("PALS_RANKID=0 PALS_LOCAL_SIZE=4", "mpirun -np 4"),
        ("PALS_RANKID=2 PALS_LOCAL_SIZE=1", "mpirun -np 3"),
        ("FLUX_TASK_RANK=0 FLUX_JOB_SIZE=4", "mpirun -np 4"),
        ("JSM_NAMESPACE_RANK=0 JSM_NAMESPACE_SIZE=4", "mpirun -np 4"),
        ("SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4", "srun --mpi=pm"),
        ("SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_NPROCS=4", "srun --mpi=pm"),
        ("SLURM_PROCID=0 SLURM_STEP_ID=0 PMI_JOBID=7.0 PMI_RANK=0 PMI_SIZE=4", "Use srun --mpi=pm"),
        ("PMIX_RANK=3 PMIX_NAMESPACE=x", "mpirun -np 4"),
    ],
)
def test_one_of_several_that_are_each_alone(variables: str, remedy: str, clean: pytest.MonkeyPatch) -> None:
    """N trainings of one rank would all end with status 0. Told by the variable, with the way out."""
    given = dict(pair.split("=") for pair in variables.split())
    for name, value in given.items():
        clean.setenv(name, value)
    with pytest.raises(collective.InvalidArgumentError, match=re.escape(remedy)) as told:
        launcher.check(1)
    assert any(str(told.value).startswith(f"{name}={given[name]}, so") for name in given)
    launcher.check(2)


@pytest.mark.parametrize(
    "variables",
    [
        "SLURM_JOB_ID=7 SLURM_NTASKS=4 SLURM_NPROCS=4 SLURM_PROCID=0",  # a batch script
        "SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1",  # salloc's shell, srun --pty bash
        "WORLD_SIZE=4",
        "RANK=3",
        "RANK=0 WORLD_SIZE=1",
        "OMPI_COMM_WORLD_SIZE=1 SLURM_PROCID=1 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4",  # whose daemons srun started
        "FLUX_JOB_SIZE=4",
    ],
)
def test_a_single_process_may_be_meant(variables: str, clean: pytest.MonkeyPatch) -> None:
    for name, value in (pair.split("=") for pair in variables.split()):
        clean.setenv(name, value)
    launcher.check(1)


def test_init_asks_the_launcher() -> None:
    """So does one with a communicator; and nobody's threads are taken away from MPI."""
    for code in (ALONE, "from mpi4py import MPI; import collective; collective.init(MPI.COMM_WORLD)"):
        done = alone(code, {"RANK": "0", "WORLD_SIZE": "4"})
        assert done.returncode == 1
        assert "InvalidArgumentError: WORLD_SIZE=4" in done.stderr
    meant = "from mpi4py import MPI; import collective; collective.init(MPI.COMM_SELF)"
    assert alone(meant, {"RANK": "0", "WORLD_SIZE": "4"}).returncode == 0
    done = alone(
        "import mpi4py; mpi4py.rc.threads = False; from mpi4py import MPI; import collective; collective.init()", {}
    )
    assert done.returncode == 1
    assert "InvalidArgumentError: MPI was initialised without MPI_THREAD_MULTIPLE" in done.stderr


def test_advice_about_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def advice(usable: int, there: int, ranks: int) -> str | None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)))
        monkeypatch.setattr(os, "cpu_count", lambda: there)
        return launcher.advice_about_cores(ranks)

    assert advice(8, 8, 4) is advice(2, 8, 4) is advice(1, 4, 4) is advice(1, 8, 1) is advice(2, 2, 2) is None
    assert "bound to one core of 16" in (told := advice(1, 16, 4) or "")
    assert "--bind-to none" in told
    assert "slot:PE=4" in told
    assert "5 ranks share the 4 cores" in (advice(4, 4, 5) or "")
