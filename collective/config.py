"""Settings from the environment: read once, at `init()`, in this one place.

| variable | default | unit | effect | also read from |
|---|---|---|---|---|
| COLLECTIVE_TIMEOUT | 300 | s | an operation that a rank has not joined by then raises CollectiveTimeoutError | \
HOROVOD_STALL_SHUTDOWN_TIME_SECONDS, unless 0 |
| COLLECTIVE_STALL_WARNING | 10 | s | after this wait a warning names the tensor and the missing ranks; 0 for never | \
HOROVOD_STALL_CHECK_TIME_SECONDS; HOROVOD_STALL_CHECK_DISABLE=1 means 0 |
| COLLECTIVE_FUSION_THRESHOLD | 8388608 | bytes | smaller tensors share buckets of up to this size; 0: none do | \
HOROVOD_FUSION_THRESHOLD |
| COLLECTIVE_SHARED_MEMORY | 1 | 0 or 1 | 0: ranks of one node use MPI messages instead of shared memory | |
| COLLECTIVE_THREAD_AFFINITY | none | cores | the core of the engine's thread, by local rank: "7,15" | \
HOROVOD_THREAD_AFFINITY |
| COLLECTIVE_CUDA_AWARE | found out | 0 or 1 | whether the MPI can send device memory; unset: two processes try it \
where that matters, see `cuda_aware` | |
| COLLECTIVE_NCCL | 0 | 0 or 1 | 1, on all ranks: NCCL makes the sums between the GPUs of a node, where ranks have one \
each | |
| COLLECTIVE_TIMELINE | none | file | record a timeline from init() on, see `start_timeline` | HOROVOD_TIMELINE, \
unless DYNAMIC |

COLLECTIVE_* wins over HOROVOD_*. Rank 0's values hold for the whole job where ranks must agree (time-outs, fusion).
HOROVOD_* variables that have no meaning here (cycle time, cache, autotuning, gloo, NCCL's) are ignored.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from environs import Env, EnvError
from marshmallow import ValidationError, validate

from .errors import InvalidArgumentError

__all__ = ["Config", "cache_directory", "environment_outside_the_job", "launched_size", "visible_devices"]

_PREFIX = "COLLECTIVE_"
_POSITIVE = validate.Range(min=0, min_inclusive=False)
_NOT_NEGATIVE = validate.Range(min=0)


@dataclass(frozen=True)
class Config:
    """The settings of this process; see the table above."""

    timeout: float
    stall_warning: float  # infinite for never
    # Large enough that per-message costs vanish, small enough that packing one bucket overlaps sending another and
    # that the first gradients do not wait for the last. Added to a ResNet-50 step as in torch/reducer.py: 1 MiB 14 to
    # 17 ms, 2, 4 and 8 MiB 10 to 14, 16 MiB 12 to 16.
    fusion_threshold: int
    shared_memory: bool
    thread_affinity: tuple[int, ...]
    timeline: str
    cuda_aware: bool | None  # None: find out
    nccl: bool

    @classmethod
    def from_environment(cls) -> Config:
        """Read the environment; a malformed value or unknown COLLECTIVE_* raises InvalidArgumentError that names it."""
        env = Env()
        try:
            config = cls(
                timeout=_timeout(env),
                stall_warning=_stall_warning(env),
                fusion_threshold=env.int(
                    _given("FUSION_THRESHOLD", "FUSION_THRESHOLD"), 8 << 20, validate=_NOT_NEGATIVE
                ),
                shared_memory=env.bool(_PREFIX + "SHARED_MEMORY", True),
                thread_affinity=tuple(
                    env.list(_given("THREAD_AFFINITY", "THREAD_AFFINITY"), [], subcast=int, validate=_cores)
                ),
                timeline=_timeline(env),
                cuda_aware=env.bool(_PREFIX + "CUDA_AWARE", None),
                nccl=env.bool(_PREFIX + "NCCL", False),
            )
        except EnvError as error:
            raise InvalidArgumentError(str(error)) from None
        known = {_PREFIX + field.upper() for field in cls.__dataclass_fields__}
        unknown = sorted(name for name in os.environ if name.startswith(_PREFIX) and name not in known)
        if unknown:
            raise InvalidArgumentError(
                f"unknown setting {', '.join(unknown)}; the settings are {', '.join(sorted(known))}"
            )
        return config


def _given(name: str, horovod_name: str) -> str:
    """Which of the two variables to read."""
    ours, theirs = _PREFIX + name, "HOROVOD_" + horovod_name
    return theirs if ours not in os.environ and theirs in os.environ else ours


def _timeout(env: Env) -> float:
    name = _given("TIMEOUT", "STALL_SHUTDOWN_TIME_SECONDS")
    seconds = env.float(name, 300.0, validate=_NOT_NEGATIVE if name.startswith("HOROVOD") else _POSITIVE)
    return seconds or 300.0  # Horovod's 0 means its default


def _stall_warning(env: Env) -> float:
    name = _given("STALL_WARNING", "STALL_CHECK_TIME_SECONDS")
    seconds = env.float(name, 10.0, validate=_NOT_NEGATIVE)
    if _PREFIX + "STALL_WARNING" not in os.environ and env.bool("HOROVOD_STALL_CHECK_DISABLE", False):
        seconds = 0.0
    return seconds or math.inf


def _timeline(env: Env) -> str:
    path = env.str(_given("TIMELINE", "TIMELINE"), "")
    return "" if path == "DYNAMIC" else path


def _cores(cores: list[int]) -> None:
    if any(core < 0 for core in cores):
        raise ValidationError("core numbers are not negative")


def launched_size() -> tuple[str, int]:
    """How many ranks the launcher says it started, and the variable that says so; ("", 1) without a launcher."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        value = os.environ.get(name, "")
        if value.isdigit():
            return name, int(value)
    return "", 1


def visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES: the devices that the launcher or the user has left to this process; None: all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


# Set by launchers (Open MPI and PRRTE, PMIx, Hydra, Slurm) and batch systems, whose nodes mpirun would else go to.
_OF_THE_JOB = re.compile(
    r"OMPI_(?!MCA_|ALLOW_RUN_AS_ROOT)"
    r"|OMPI_MCA_(orte|ess|plm|ras|rmaps|pmix|PREFIXES|num_procs|initial_wdir|cpu_type|mpi_oversubscribe|shmem_RUNTIME)"
    r"|ORTE_|PRTE_(?!MCA_)|PMIX_(?!MCA_|INSTALL_PREFIX)|PMI2?_|MPI_LOCAL|HYDI_|HYDRA_|SLURM|FLUX_|PALS_|PBS_|LSB_|PE_HOSTFILE"
)


def environment_outside_the_job() -> dict[str, str]:
    """Our environment without what makes this process a rank of its job, for another mpirun.

    What chooses the MPI's transports stays: OMPI_MCA_*, UCX_*, FI_*, MPIR_CVAR_*.
    """
    return {name: value for name, value in os.environ.items() if not _OF_THE_JOB.match(name)}


def cache_directory() -> Path:
    """Where compiled kernels are kept, as the XDG Base Directory Specification has it; it may not exist."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = given if os.path.isabs(given) else os.path.expanduser("~/.cache")
    return Path(base) / "collective"
