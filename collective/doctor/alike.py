"""Checks of what ought to be alike on all ranks: versions and settings."""

from __future__ import annotations

from .findings import Finding, by_value, fail, ok, warn
from .job import Job

__all__ = ["settings", "versions"]

_MUST_AGREE = ("collective", "machine")  # init() refuses others
_OF_RANK_0 = ("TIMEOUT", "STALL_WARNING", "FUSION_THRESHOLD")
# What a single rank may be given on purpose; what is about files and traces counts on rank 0.
_MAY_DIFFER = ("TIMELINE", "TRACE", "TRACE_STEPS", "TRACE_MAX_MB", "LOG_LEVEL", "THREAD_AFFINITY")


def versions(job: Job) -> list[Finding]:
    findings = []
    for name in job.ranks[0]["versions"]:
        values = [facts["versions"].get(name, "none") for facts in job.ranks]
        if len(set(values)) > 1:
            text = f"{name} differs: {by_value(values)}"
            remedy = "Use one environment on all hosts, on a shared file system or installed alike."
            findings.append(fail(text, remedy) if name in _MUST_AGREE else warn(text, remedy))
    if findings:
        return findings
    mine = dict(job.ranks[0]["versions"])
    machine = mine.pop("machine")
    alike = "" if len(job.ranks) == 1 else "on all ranks: "
    return [ok(alike + ", ".join(f"{name} {version}" for name, version in mine.items()) + f"; {machine}")]


def settings(job: Job) -> list[Finding]:
    findings = []
    everyone = [facts["settings"] for facts in job.ranks]
    for name in sorted({name for own in everyone for name in own}):
        values = [own.get(name, "not set") for own in everyone]
        if len(set(values)) == 1:
            findings.append(ok(f"{name}={values[0]}"))
        elif _without_prefix(name) in _MAY_DIFFER:
            findings.append(ok(f"{name} differs, which it may: {by_value(values)}"))
        else:
            holds = " (rank 0's holds for all)" if _without_prefix(name) in _OF_RANK_0 else ""
            remedy = f"Hand it to all hosts: mpirun -x {name}, or set it in the batch script."
            findings.append(warn(f"{name} differs{holds}: {by_value(values)}", remedy))
    return findings or [ok("the defaults: no COLLECTIVE_* or HOROVOD_* variable is set")]


def _without_prefix(name: str) -> str:
    return name.partition("_")[2]
