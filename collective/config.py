"""Settings from the environment: read once, at `init()`, and only here.

| variable | default | unit | effect | also read from |
|---|---|---|---|---|
| COLLECTIVE_TIMEOUT | 300 | s | an operation that a rank has not joined by then raises CollectiveTimeoutError; 0 or \
inf for never | HOROVOD_STALL_SHUTDOWN_TIME_SECONDS |
| COLLECTIVE_STALL_WARNING | 10 | s | after this wait a warning names the tensor and the missing ranks; 0 or inf for \
never | HOROVOD_STALL_CHECK_TIME_SECONDS; HOROVOD_STALL_CHECK_DISABLE=1 means 0 |
| COLLECTIVE_VERDICT_FILE | none | file | such warnings are appended to it, with the stacks of all ranks | |
| COLLECTIVE_OUT_OF_BAND | 1 | 0 or 1 | 0: the processes of a job do not open ports by which they ask each other; then \
warnings of stalls tell less, and `collective top` does not see the job | |
| COLLECTIVE_CHECK_CALL_SITES | 0 | 0 or 1 | 1: calls that meet must come from the same line of the script, so that \
two that are swapped are told apart even if all else is equal | |
| COLLECTIVE_FUSION_THRESHOLD | 8388608 | bytes | smaller tensors share buckets of up to this size; 0: none do | \
HOROVOD_FUSION_THRESHOLD |
| COLLECTIVE_SHARED_MEMORY | 1 | 0 or 1 | 0: ranks of one node use MPI messages instead of shared memory | |
| COLLECTIVE_THREAD_AFFINITY | none | cores | the core of the engine's thread, by local rank: "7,15" | \
HOROVOD_THREAD_AFFINITY |
| COLLECTIVE_CUDA_AWARE | found out | 0 or 1 | whether the MPI can send device memory; unset: two processes try it \
where that matters, see `cuda_aware` | |
| COLLECTIVE_NCCL | 0 | 0 or 1 | 1, on all ranks: NCCL does the sums between the GPUs of a node, if each rank has its \
own | |
| COLLECTIVE_STRAGGLERS | 1 | 0 or 1 | 0: shutdown() does not tell of ranks that held up the others, see \
`stragglers` | |
| COLLECTIVE_LOG_LEVEL | warning | trace, debug, info, warning, error or fatal | error: no warnings; fatal: nothing | \
HOROVOD_LOG_LEVEL |
| COLLECTIVE_TIMELINE | none | file | record a timeline from init() on, see `start_timeline` | HOROVOD_TIMELINE, \
unless DYNAMIC |
| COLLECTIVE_TRACE | none | file | record one trace of all ranks from init() on, see `start_trace` | |
| COLLECTIVE_TRACE_STEPS | all | steps | of that trace: "100-110" or "100", counted from 0, see `mark_step` | |
| COLLECTIVE_TRACE_MAX_MB | 256 | MiB | how long that trace may become; what comes later is dropped | |
| COLLECTIVE_METRICS | none | port | rank 0 serves metrics of all ranks for Prometheus at this port of its loopback \
interface; address:port, such as 0.0.0.0:9400, for others | |

COLLECTIVE_* wins over HOROVOD_*. Rank 0's values hold for the whole job where ranks must agree (time-outs, fusion,
traces). HOROVOD_* variables that have no meaning here (cycle time, cache, autotuning, gloo, NCCL's) are ignored.
"""

from __future__ import annotations

import enum
import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environs import Env, EnvError
from marshmallow import ValidationError, validate

from .errors import InvalidArgumentError

__all__ = [
    "MOST_TRACE_MB",
    "Config",
    "Launched",
    "LogLevel",
    "Slurm",
    "cache_directory",
    "environment",
    "environment_outside_the_job",
    "gloo_interface",
    "launched",
    "launched_number",
    "launcher_variables",
    "mark_rank",
    "marked_rank",
    "of_ranks",
    "override",
    "slurm_allocation",
    "slurm_job",
    "tell_torch",
    "visible_devices",
]

_PREFIX = "COLLECTIVE_"
_MARK = _PREFIX + "RANK_PID"  # no setting: see mark_rank
_OF_RANK_0 = {  # and what else each is read from
    _PREFIX + "TIMEOUT": ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"],
    _PREFIX + "STALL_WARNING": ["HOROVOD_STALL_CHECK_TIME_SECONDS", "HOROVOD_STALL_CHECK_DISABLE"],
    _PREFIX + "FUSION_THRESHOLD": ["HOROVOD_FUSION_THRESHOLD"],
    _PREFIX + "OUT_OF_BAND": [],
    _PREFIX + "CHECK_CALL_SITES": [],
}
_NOT_NEGATIVE = validate.Range(min=0)
MOST_TRACE_MB = 2048  # what one message of MPI's holds


class LogLevel(enum.IntEnum):
    """Horovod's names; csrc/base/log.h has the same numbers."""

    TRACE = 0
    DEBUG = 1
    INFO = 2
    WARNING = 3
    ERROR = 4
    FATAL = 5


@dataclass(frozen=True)
class Config:
    """The settings of this process; see the table above."""

    timeout: float  # infinite for never
    stall_warning: float  # infinite for never
    # Large enough that per-message costs vanish, small enough that packing one bucket overlaps sending another and
    # that the first gradients do not wait for the last. Time added to a ResNet-50 step, as in torch/views.py: 1 MiB
    # 14 to 17 ms; 2, 4 and 8 MiB 10 to 14; 16 MiB 12 to 16.
    fusion_threshold: int
    shared_memory: bool
    thread_affinity: tuple[int, ...]
    stragglers: bool
    log_level: LogLevel
    timeline: str
    verdict_file: str
    out_of_band: bool
    check_call_sites: bool
    trace: str  # "" for none
    trace_steps: tuple[int, int] | None  # the first and the last one; None: all
    trace_max_mb: int
    cuda_aware: bool | None  # None: find out
    nccl: bool
    metrics: tuple[str, int] | None  # address and port; None: do not serve them

    @classmethod
    def from_environment(cls) -> Config:
        """Read the environment; a malformed value or unknown COLLECTIVE_* raises InvalidArgumentError, naming it."""
        env = Env()
        try:
            config = cls(
                timeout=_seconds(env, _given("TIMEOUT", "STALL_SHUTDOWN_TIME_SECONDS"), 300.0),
                stall_warning=_stall_warning(env),
                fusion_threshold=env.int(
                    _given("FUSION_THRESHOLD", "FUSION_THRESHOLD"), 8 << 20, validate=_NOT_NEGATIVE
                ),
                shared_memory=env.bool(_PREFIX + "SHARED_MEMORY", True),
                thread_affinity=tuple(
                    env.list(_given("THREAD_AFFINITY", "THREAD_AFFINITY"), [], subcast=int, validate=_cores)
                ),
                stragglers=env.bool(_PREFIX + "STRAGGLERS", True),
                log_level=_log_level(env),
                timeline=_timeline(env),
                verdict_file=env.str(_PREFIX + "VERDICT_FILE", ""),
                out_of_band=env.bool(_PREFIX + "OUT_OF_BAND", True),
                check_call_sites=env.bool(_PREFIX + "CHECK_CALL_SITES", False),
                trace=env.str(_PREFIX + "TRACE", ""),
                trace_steps=_trace_steps(env),
                trace_max_mb=env.int(_PREFIX + "TRACE_MAX_MB", 256, validate=validate.Range(1, MOST_TRACE_MB)),
                cuda_aware=env.bool(_PREFIX + "CUDA_AWARE", None),
                nccl=env.bool(_PREFIX + "NCCL", False),
                metrics=_metrics(env),
            )
        except EnvError as error:
            raise InvalidArgumentError(str(error)) from None
        known = {_PREFIX + field.upper() for field in cls.__dataclass_fields__}
        unknown = sorted(name for name in os.environ if name.startswith(_PREFIX) and name not in known | {_MARK})
        if unknown:
            raise InvalidArgumentError(
                f"unknown setting {', '.join(unknown)}; the settings are {', '.join(sorted(known))}"
            )
        return config

    def agreed(self) -> dict[str, float]:
        """The settings of which rank 0's hold for the whole job, by variable."""
        return {name: getattr(self, _field(name)) for name in _OF_RANK_0}

    @staticmethod
    def fields_of(settings: Mapping[str, Any]) -> dict[str, Any]:
        """What `agreed` returned on some rank, by the names of the fields here."""
        return {_field(name): value for name, value in settings.items()}

    def given(self) -> dict[str, float]:
        """Those of them that this process has been given, rather than the default."""
        return {
            name: value
            for name, value in self.agreed().items()
            if any(variable in os.environ for variable in (name, *_OF_RANK_0[name]))
        }


def _field(name: str) -> str:
    return name.removeprefix(_PREFIX).lower()


def _given(name: str, horovod_name: str) -> str:
    """Which of the two variables to read."""
    ours, theirs = _PREFIX + name, "HOROVOD_" + horovod_name
    return theirs if ours not in os.environ and theirs in os.environ else ours


def _seconds(env: Env, name: str, default: float) -> float:
    """A time to wait; infinite for never."""
    seconds: float = env.float(name, default, validate=_not_nan, allow_nan=True)
    return seconds or math.inf


def _not_nan(seconds: float) -> None:
    if not seconds >= 0:
        raise ValidationError("a number of seconds, not negative; 0 or inf for never")


def _stall_warning(env: Env) -> float:
    seconds = _seconds(env, _given("STALL_WARNING", "STALL_CHECK_TIME_SECONDS"), 10.0)
    if _PREFIX + "STALL_WARNING" not in os.environ and env.bool("HOROVOD_STALL_CHECK_DISABLE", False):
        return math.inf
    return seconds


def _log_level(env: Env) -> LogLevel:
    name = env.str(_given("LOG_LEVEL", "LOG_LEVEL"), "warning", validate=_level).upper()
    return LogLevel[name]


def _level(name: str) -> None:
    if name.upper() not in LogLevel.__members__:
        raise ValidationError(f"one of {', '.join(level.lower() for level in LogLevel.__members__)}")


def _timeline(env: Env) -> str:
    path = env.str(_given("TIMELINE", "TIMELINE"), "")
    return "" if path == "DYNAMIC" else path


def _trace_steps(env: Env) -> tuple[int, int] | None:
    text = env.str(_PREFIX + "TRACE_STEPS", "", validate=_steps)
    if not text:
        return None
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def _steps(text: str) -> None:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if text and (found is None or int(found[2] or found[1]) < int(found[1])):
        raise ValidationError('a step, or the first and the last one: "100" or "100-110"')


def _metrics(env: Env) -> tuple[str, int] | None:
    text = env.str(_PREFIX + "METRICS", "", validate=_address)
    host, _, port = text.rpartition(":")
    return (host.strip("[]") or "127.0.0.1", int(port)) if text else None


def _address(text: str) -> None:
    port = text.rpartition(":")[2]
    if text and not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValidationError("a port, or an address and a port: 9400, 0.0.0.0:9400")


def _cores(cores: list[int]) -> None:
    if any(core < 0 for core in cores):
        raise ValidationError("core numbers are not negative")


@dataclass(frozen=True)
class Launched:
    """A launcher that has started several processes, this one among them, as the environment tells."""

    launcher: str
    variable: str
    value: str
    ranks: int  # at least this many


# What launchers tell each process: (launcher, its number, how many there are), the innermost first: an MPI's launcher
# may itself have been started by another one, once per node. One number by itself proves nothing: people export
# WORLD_SIZE, and a batch script has SLURM_NTASKS and SLURM_PROCID without being an srun step; only a step has
# SLURM_STEP_ID.
_LAUNCHERS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("torchrun", ("RANK", "WORLD_SIZE"), ("WORLD_SIZE",)),
    ("mpirun", (), ("OMPI_COMM_WORLD_SIZE",)),  # Open MPI
    ("srun", ("SLURM_PROCID", "SLURM_STEP_ID", "PMI_JOBID"), ("PMI_SIZE",)),  # --mpi=pmi2; Hydra has no PMI_JOBID
    ("mpirun", (), ("PMI_SIZE",)),  # Hydra (MPICH, Intel MPI), also in a Slurm allocation; Cray
    ("mpirun", ("MPI_LOCALRANKID",), ("MPI_LOCALNRANKS",)),
    ("mpirun", ("MV2_COMM_WORLD_RANK",), ("MV2_COMM_WORLD_SIZE",)),  # MVAPICH
    ("PALS", ("PALS_RANKID",), ("PALS_NRANKS", "PALS_LOCAL_SIZE")),
    ("flux", ("FLUX_TASK_RANK",), ("FLUX_JOB_SIZE",)),
    ("jsrun", ("JSM_NAMESPACE_RANK",), ("JSM_NAMESPACE_SIZE",)),
    ("srun", ("SLURM_PROCID", "SLURM_STEP_ID"), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")),
    ("PMIx", ("PMIX_RANK",), ()),
    ("ALPS", ("ALPS_APP_PE",), ()),
)


def launched() -> Launched | None:
    """What the innermost launcher says, if it has started more than one process."""
    for launcher, numbers, counts in _LAUNCHERS:
        if any(name not in os.environ for name in numbers):
            continue
        count = next((name for name in counts if os.environ.get(name, "").isdigit()), None)
        if count is not None and (ranks := int(os.environ[count])) > 1:
            return Launched(launcher, count, os.environ[count], ranks)
        number = os.environ[numbers[0]] if numbers else ""
        if number.isdigit() and int(number) > 0:
            return Launched(launcher, numbers[0], number, int(number) + 1)
        # This launcher knows of one process only. torchrun's variables prove less: they are also set by hand.
        if count is not None and launcher != "torchrun":
            return None
    return None


def launched_number() -> int:
    """This process's number by its innermost launcher, where it cannot ask MPI; 0 if none tells."""
    told = [*(numbers for _, numbers, _ in _LAUNCHERS if numbers), ("OMPI_COMM_WORLD_RANK",), ("PMI_RANK",)]
    values = (os.environ[names[0]] for names in told if all(name in os.environ for name in names))
    return next((int(value) for value in values if value.isdigit()), 0)


# What makes a process the rank that it is; some of these differ in a child that another launcher has started.
_PLACE = (
    *("PMIX_NAMESPACE", "PMIX_RANK", "PMI_JOBID", "PMI_RANK", "PMI_FD", "PMI_PORT", "MPI_LOCALRANKID"),
    *("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID"),
    *("PALS_APID", "PALS_RANKID", "FLUX_JOB_ID", "FLUX_TASK_RANK", "JSM_NAMESPACE_RANK"),
)


def _place() -> str:
    """This process's place in a launcher's job, as one word; "" if no launcher has started it."""
    values = [(name, os.environ[name]) for name in _PLACE if name in os.environ]
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16] if values else ""


def mark_rank(pid: int, rank: int) -> None:
    """Record in the environment, for child processes, that this process is a rank."""
    os.environ[_MARK] = f"{pid}:{rank}:{_place()}"


def marked_rank() -> tuple[int, int] | None:
    """The process id and number of the rank whose place this process has, itself or inherited; None: it has neither.

    Without a launcher there is no place: a child stands alone, as its parent does.
    """
    found = re.fullmatch(r"(\d+):(\d+):(\w*)", os.environ.get(_MARK, ""))
    if found is None:
        return None
    return (int(found[1]), int(found[2])) if found[3] == _place() != "" else None


def visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES: the devices that the launcher or the user lets this process see; None: all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


# Set by launchers (Open MPI and PRRTE, PMIx, Hydra, Slurm), and by batch systems, whose nodes mpirun would use.
_OF_THE_JOB = re.compile(
    r"OMPI_(?!MCA_|ALLOW_RUN_AS_ROOT)"
    r"|OMPI_MCA_(orte|ess|plm|ras|rmaps|pmix|PREFIXES|num_procs|initial_wdir|cpu_type|mpi_oversubscribe|shmem_RUNTIME)"
    r"|ORTE_|PRTE_(?!MCA_)|PMIX_(?!MCA_|INSTALL_PREFIX)|PMI2?_|MPI_LOCAL|HYDI_|HYDRA_|SLURM|FLUX_|PALS_|PBS_|LSB_|PE_HOSTFILE"
    rf"|JSM_|ALPS_|MV2_COMM_|{_MARK}"
)


def environment_outside_the_job() -> dict[str, str]:
    """The environment for another mpirun: ours without what makes this process a rank of its job.

    Variables that choose the MPI's transports stay: OMPI_MCA_*, UCX_*, FI_*, MPIR_CVAR_*.
    """
    return {name: value for name, value in os.environ.items() if not _OF_THE_JOB.match(name)}


def environment() -> dict[str, str]:
    """All of it, for a launcher that starts ranks."""
    return dict(os.environ)


# What ranks on other hosts need of it: launchers pass on their own variables only.
_OF_RANKS = re.compile(r"(COLLECTIVE|HOROVOD)_(?!RANK_PID$)|(PATH|PYTHONPATH|LD_LIBRARY_PATH|OMP_NUM_THREADS)$")


def of_ranks(names: Iterable[str]) -> list[str]:
    """The variables among these that every rank is to have, sorted."""
    return sorted(name for name in names if _OF_RANKS.match(name))


@dataclass(frozen=True)
class Slurm:
    """An allocation in which this process runs."""

    nodes: int
    ranks: int | None  # unless the user has not said how many
    cores_per_rank: int | None  # the same
    cores: int  # of this node


def slurm_allocation() -> Slurm | None:
    """Slurm's, if salloc or sbatch has started this process in one."""
    if "SLURM_JOB_ID" not in os.environ:
        return None

    def number(*names: str) -> int | None:
        return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), None)

    return Slurm(
        number("SLURM_JOB_NUM_NODES", "SLURM_NNODES") or 1,
        number("SLURM_NTASKS", "SLURM_NPROCS"),
        number("SLURM_CPUS_PER_TASK"),
        number("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0)),
    )


def launcher_variables() -> dict[str, str]:
    """The rest: what a launcher or batch system has told this process."""
    return {name: value for name, value in os.environ.items() if _OF_THE_JOB.match(name) and name != _MARK}


def cache_directory() -> Path:
    """The directory of compiled kernels, by the XDG Base Directory Specification; it may not exist."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = given if os.path.isabs(given) else os.path.expanduser("~/.cache")
    return Path(base) / "collective"


def timeout_is_set() -> bool:
    """Whether the user has chosen the time-out of operations."""
    return _given("TIMEOUT", "STALL_SHUTDOWN_TIME_SECONDS") in os.environ


def slurm_job() -> str | None:
    """The number of the Slurm job that this process belongs to."""
    return os.environ.get("SLURM_JOB_ID") or None


def tell_torch(variables: Mapping[str, str], interface: str) -> None:
    """Set what torch.distributed reads; and gloo's interface, unless the user has told it another."""
    os.environ.update(variables)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def override(**settings: str) -> None:
    """Set COLLECTIVE_* variables of this process, for what it starts next: override(LOG_LEVEL="warning")."""
    os.environ.update({_PREFIX + name: value for name, value in settings.items()})


def gloo_interface() -> str | None:
    """The network interface that the user has told gloo to use."""
    return os.environ.get("GLOO_SOCKET_IFNAME")
