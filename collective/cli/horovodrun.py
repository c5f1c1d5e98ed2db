"""What becomes of horovodrun's flags and of its configuration file.

Those with a meaning here set a variable of `collective.config`. Those that tune what does not exist here are accepted
and named in one line. Those that ask for another way of starting or running a job are refused, with the reason.
docs/running.md has the table for readers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from ..config import LogLevel
from .options import Problem, option

__all__ = ["READ_CONFIG", "ignored", "options", "refuse", "settings"]

Function = TypeVar("Function", bound=Callable[..., Any])
Value = bool | int | float | str
_NOT_NEGATIVE = click.FloatRange(min=0)
_SETTINGS, _IGNORED, _REFUSED = (
    "Settings of the engine (all: collective/config.py)",
    "Of horovodrun, without effect here",
    "Of horovodrun, refused",
)


@dataclass(frozen=True)
class Setting:
    """A flag that sets a variable."""

    names: tuple[str, ...]
    variable: str
    help: str
    type: click.ParamType[Any]
    value: Callable[[Any], str] = str


@dataclass(frozen=True)
class Flag:
    """Flags that are accepted for nothing, or refused, for one reason; values are not looked at."""

    reason: str
    switches: tuple[str, ...] = ()
    with_value: tuple[str, ...] = ()
    with_two_values: tuple[str, ...] = ()


SETTINGS = (
    Setting(
        ("--fusion-threshold-mb",),
        "COLLECTIVE_FUSION_THRESHOLD",
        "Smaller tensors share buckets of up to this many MiB; 0: none do.  [default: 8]",
        _NOT_NEGATIVE,
        lambda mebibytes: str(int(mebibytes * (1 << 20))),
    ),
    Setting(
        ("--timeline-filename",),
        "COLLECTIVE_TIMELINE",
        "Record a timeline to this file.  [default: none]",
        click.Path(dir_okay=False),
    ),
    Setting(
        ("--stall-check-warning-time-seconds",),
        "COLLECTIVE_STALL_WARNING",
        "Warn of ranks that are late after this time; 0: never.  [default: 10]",
        _NOT_NEGATIVE,
        lambda seconds: f"{seconds:g}",
    ),
    Setting(
        ("--stall-check-shutdown-time-seconds",),
        "COLLECTIVE_TIMEOUT",
        "Give up on ranks that are late after this time; 0: never.  [default: 300]",
        _NOT_NEGATIVE,
        lambda seconds: f"{seconds:g}",
    ),
    Setting(
        ("--thread-affinity",),
        "COLLECTIVE_THREAD_AFFINITY",
        "The core of each engine's thread, by local rank: 7,15.  [default: none]",
        click.STRING,
    ),
    Setting(
        ("--log-level",),
        "COLLECTIVE_LOG_LEVEL",
        "How much the engine says.  [default: warning]",
        click.Choice([level.lower() for level in LogLevel.__members__], case_sensitive=False),
    ),
)

IGNORED = (
    Flag("there is no cycle", ("--timeline-mark-cycles", "--no-timeline-mark-cycles"), ("--cycle-time-ms",)),
    Flag("names that all ranks know need no cache of a fixed size", with_value=("--cache-capacity",)),
    Flag("hosts are checked every time", ("--disable-cache",)),
    Flag(
        "nodes are used hierarchically wherever that is faster",
        tuple(
            f"--{no}{name}"
            for name in ("hierarchical-allreduce", "hierarchical-allgather", "torus-allreduce")
            for no in ("", "no-")
        ),
    ),
    Flag(
        "thresholds are measured, not tuned",
        ("--autotune", "--no-autotune"),
        tuple(
            f"--autotune-{name}"
            for name in (
                *("log-file", "warmup-samples", "steps-per-sample", "bayes-opt-max-samples"),
                "gaussian-process-noise",
            )
        ),
    ),
    Flag("MPI is what there is, and it is used by several threads", ("--mpi", "--no-mpi-threads-disable")),
    Flag("nothing goes over gloo", with_value=("--gloo-timeout-seconds",)),
    Flag("NCCL has the streams that it chooses", with_value=("--num-nccl-streams",)),
    Flag(
        "the engine's lines have no time",
        ("--log-with-timestamp", "--log-without-timestamp", "--log-hide-timestamp", "--no-log-hide-timestamp"),
    ),
)

REFUSED = (
    Flag(
        "jobs run over MPI only; there is no gloo in this package (torch.distributed has it)",
        ("--gloo",),
    ),
    Flag(
        "the ranks of an MPI job stay the same from start to end, so it cannot grow or shrink; write checkpoints, and "
        "start again with another -np",
        with_value=(
            *("--min-np", "--min-num-proc", "--max-np", "--max-num-proc", "--slots-per-host", "--elastic-timeout"),
            *("--reset-limit", "--host-discovery-script"),
        ),
        with_two_values=("--blacklist-cooldown-range",),
    ),
    Flag("jsrun is not started from here: jsrun -n RANKS python train.py inside the allocation", ("--jsrun",)),
    Flag("the engine has a thread of its own, so MPI must allow several", ("--mpi-threads-disable",)),
)


def _name(flag: str) -> str:
    """Of the parameter that click makes."""
    return flag.lstrip("-").replace("-", "_")


def options(function: Function) -> Function:
    """Declare all flags of this file."""
    declared = [
        option(_SETTINGS, *setting.names, type=setting.type, help=setting.help, metavar=_metavar(setting))
        for setting in SETTINGS
    ]
    declared.append(
        option(
            _SETTINGS,
            "--stall-check/--no-stall-check",
            default=None,
            help="Whether to warn of ranks that are late.  [default: stall-check]",
        )
    )
    for section, flags in ((_IGNORED, IGNORED), (_REFUSED, REFUSED)):
        for flag in flags:
            names = [*flag.switches, *flag.with_value, *flag.with_two_values]
            for position, name in enumerate(names):
                # One line of --help for each reason.
                kwargs: dict[str, Any] = {"help": f"{', '.join(names[1:])}: {flag.reason}.".lstrip(": ")}
                if name in flag.switches:
                    kwargs |= {"is_flag": True, "default": None}
                else:
                    kwargs |= {"metavar": "VALUE", "nargs": 2 if name in flag.with_two_values else 1}
                declared.append(option(section, name, _name(name), hidden=position > 0, **kwargs))
    for decorate in reversed(declared):
        function = decorate(function)
    return function


def _metavar(setting: Setting) -> str | None:
    if setting.type is _NOT_NEGATIVE:
        return "MIB" if setting.names[0].endswith("-mb") else "SECONDS"
    return {"--thread-affinity": "CORES", "--timeline-filename": "FILE"}.get(setting.names[0])


def refuse(given: dict[str, Any]) -> None:
    """Raise a Problem for flags that ask for what cannot be."""
    for flag in REFUSED:
        names = [name for name in (*flag.switches, *flag.with_value, *flag.with_two_values) if given.get(_name(name))]
        if names:
            raise Problem(f"{' and '.join(names)}: {flag.reason}.")


def ignored(given: dict[str, Any]) -> str:
    """One line about flags that have no effect; empty: none was given."""
    told = []
    for flag in IGNORED:
        names = [name for name in (*flag.switches, *flag.with_value) if given.get(_name(name)) is not None]
        if names:
            told.append(f"{', '.join(names)} ({flag.reason})")
    return f"without effect here: {'; '.join(told)}" if told else ""


def settings(given: dict[str, Any]) -> dict[str, str]:
    """The variables that the flags set."""
    found = {
        setting.variable: setting.value(value)
        for setting in SETTINGS
        if (value := given.get(_name(setting.names[0]))) is not None
    }
    return found | ({"COLLECTIVE_STALL_WARNING": "0"} if given.get("stall_check") is False else {})


# Sections and keys of the configuration file, and the flags that they stand for.
_KEYS: dict[str, dict[str, str]] = {
    "params": {
        key: key
        for key in (
            *("fusion_threshold_mb", "cycle_time_ms", "cache_capacity", "hierarchical_allreduce"),
            *("hierarchical_allgather", "torus_allreduce"),
        )
    },
    "autotune": {
        "enabled": "autotune",
        **{
            key: f"autotune_{key}"
            for key in (
                *("log_file", "warmup_samples", "steps_per_sample", "bayes_opt_max_samples"),
                "gaussian_process_noise",
            )
        },
    },
    "timeline": {"filename": "timeline_filename", "mark_cycles": "timeline_mark_cycles"},
    "stall_check": {
        "enabled": "stall_check",
        "warning_time_seconds": "stall_check_warning_time_seconds",
        "shutdown_time_seconds": "stall_check_shutdown_time_seconds",
    },
    "library_options": {
        key: key for key in ("mpi_threads_disable", "num_nccl_streams", "thread_affinity", "gloo_timeout_seconds")
    },
    "logging": {
        "level": "log_level",
        "hide_timestamp": "log_hide_timestamp",
        "log_hide_timestamp": "log_hide_timestamp",
    },
}


def _read_config(ctx: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """Take the file's values as defaults, so that the command line wins."""
    if path is None:
        return None
    try:
        found = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Problem(f"--config-file {path} cannot be read: {' '.join(str(error).split())}") from None
    defaults: dict[str, Value] = {}
    for section, values in found.items() if isinstance(found, dict) else [("the whole", found)]:
        if section not in _KEYS or not isinstance(values, dict):
            raise Problem(f"--config-file {path}: {section!r} is no section with keys; there are {', '.join(_KEYS)}")
        for key, value in values.items():
            if key not in _KEYS[section]:
                raise Problem(f"--config-file {path}: {section} has no {key!r}, only {', '.join(_KEYS[section])}")
            if value is not None:
                defaults[_KEYS[section][key]] = value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


READ_CONFIG: dict[str, Any] = {"callback": _read_config, "is_eager": True}
