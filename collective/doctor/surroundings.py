"""Checks of the environment that a job brings along: transports, modules in the way, the allocator."""

from __future__ import annotations

from .findings import Finding, ok, warn
from .job import Job

__all__ = ["allocator", "packages", "transports"]

_MMAP, _TRIM = "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"
_BOTH = f"{_MMAP}=33554432 {_TRIM}=268435456"


def transports(job: Job) -> list[Finding]:
    """What chooses the MPI's ways, or loads libraries before it: for the eye, as any of it may be meant."""
    found = job.ranks[0]["transports"]
    return [ok(" ".join(f"{name}={value}" for name, value in found.items()) if found else "nothing is set")]


def packages(job: Job) -> list[Finding]:
    """Whether Python finds this package in more than one place."""
    for rank, facts in enumerate(job.ranks):
        used, *others = facts["packages"]
        if others:
            text = f"{job.name_of(rank)} uses {used}, which hides {', '.join(others)}"
            remedy = "Take the one that is not meant off PYTHONPATH, or start in another directory."
            return [warn(text, remedy)]
    return [ok(job.ranks[0]["packages"][0])]


def allocator(job: Job) -> list[Finding]:
    """glibc gives large blocks back at once, and training gets them again by page faults."""
    found = job.ranks[0]["malloc"]
    if any(name in found.get("LD_PRELOAD", "") for name in ("jemalloc", "tcmalloc", "mimalloc")):
        return [ok(f"LD_PRELOAD={found['LD_PRELOAD']}")]
    tuned = found.get("GLIBC_TUNABLES", "")
    has_mmap = _MMAP in found or "glibc.malloc.mmap_threshold" in tuned
    has_trim = _TRIM in found or "glibc.malloc.trim_threshold" in tuned
    if has_trim and not has_mmap:
        text = f"{_TRIM} without {_MMAP} fixes the latter at 128 KiB, and every larger block is mapped afresh"
        return [warn(text, f"Set both: {_BOTH}.")]
    if has_mmap and has_trim:
        return [ok(" ".join(f"{name}={value}" for name, value in found.items()))]
    return [ok(f"glibc's own; for training on CPUs {_BOTH} saves page faults")]
