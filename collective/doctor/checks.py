"""All checks, in the order of the report."""

from __future__ import annotations

from collections.abc import Callable

from . import alike, gpus, launch, memory, network, placement, surroundings
from .findings import Finding, fail, ranks_text
from .job import Job

__all__ = ["CHECKS", "run"]

Check = Callable[[Job], list[Finding]]


def _facts(job: Job) -> list[Finding]:
    """What could not be found out, or measured."""
    reasons: dict[str, list[int]] = {}
    for rank, facts in enumerate(job.ranks):
        for name, error in facts["errors"].items():
            reasons.setdefault(f"{name}: {error}", []).append(rank)
    return [fail(f"{ranks_text(ranks)} could not tell {text}", "Report this.") for text, ranks in reasons.items()] + [
        fail(f"could not be measured: {what}: {error}", "Look at the MPI's transports and the network.")
        for what, error in job.measured.errors.items()
    ]


CHECKS: dict[str, Check] = {
    "start": launch.start,
    "MPI": launch.library,
    "launcher": launch.launcher,
    "ranks": placement.ranks,
    "cores": placement.cores,
    "threads": placement.threads,
    "shared memory": memory.shared,
    "/dev/shm": memory.shm,
    "huge pages": memory.huge_pages,
    "memory": memory.host_memory,
    "limits": memory.limits,
    "versions": alike.versions,
    "settings": alike.settings,
    "addresses": network.way,
    "network": network.between_nodes,
    "clocks": network.clocks,
    "node": network.within_nodes,
    "all-reduce": network.all_reduces,
    "devices": gpus.gpus,
    "transports": surroundings.transports,
    "package": surroundings.packages,
    "malloc": surroundings.allocator,
    "facts": _facts,
}


def run(job: Job, checks: dict[str, Check] = CHECKS) -> list[tuple[str, Finding]]:
    """The findings of each check, by its name."""
    found = []
    for name, check in checks.items():
        try:
            found += [(name, finding) for finding in check(job)]
        except Exception as error:  # one that does not understand what it sees must not hide what the others say
            text = f"this check ended in {type(error).__name__}: {error}"
            found.append((name, fail(text, "See `facts` below where a fact is missing; else report this.")))
    return found
