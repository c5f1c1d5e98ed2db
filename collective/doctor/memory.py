"""Checks of memory: shared between ranks, and what limits it."""

from __future__ import annotations

from collections.abc import Callable

from .facts import Facts
from .findings import Finding, fail, ok, ranks_text, size_text, warn
from .job import Job

__all__ = ["host_memory", "huge_pages", "limits", "shared", "shm"]

_MPI_SEGMENT = 16 << 20  # of a rank, by Open MPI in /dev/shm
_LEAST_PER_RANK = 512 << 20
_LEAST_LOCKED = 1 << 30
_SPARE_FILES = 256  # that Python, torch and the script may have open


def _on_nodes(job: Job, look: Callable[[Facts, list[int]], Finding]) -> list[Finding]:
    """What is wrong on any node; where nothing is, that of the first."""
    findings = [look(job.ranks[first], members) for first, members in job.nodes.items()]
    return list(dict.fromkeys(finding for finding in findings if finding.remedy)) or findings[:1]


def shared(job: Job) -> list[Finding]:
    """Whether the ranks of each node share memory."""
    if job.error:
        return []
    several = [members for members in job.nodes.values() if len(members) > 1]
    if not several:
        return [ok("no rank has another one on its node to share with")]
    findings = []
    for members in several:
        if why := job.ranks[members[0]]["shared_memory"]:
            text = f"{ranks_text(members)} do not share memory, and use MPI's messages, which is slower: {why}"
            findings.append(warn(text, _remedy(why)))
    return findings or [ok("the ranks of each node share memory")]


def _remedy(why: str) -> str:
    if "COLLECTIVE_SHARED_MEMORY" in why:
        return "Unset it: one rank's setting is enough to switch it off for all."
    if "Permission denied" in why or "Operation not permitted" in why:
        return (
            "Let processes of one user look at each other: in a container --cap-add=SYS_PTRACE, else "
            "sysctl kernel.yama.ptrace_scope=0."
        )
    return "Start all ranks of a host in one container, or with one PID namespace (docker run --pid=host)."


def shm(job: Job) -> list[Finding]:
    """/dev/shm, in which MPI and torch's DataLoader have their shared memory; this package's is not in it."""
    return _on_nodes(job, _shm)


def _shm(facts: Facts, members: list[int]) -> Finding:
    size, free = facts["shm"]["size"], facts["shm"]["free"]
    if size == 0:
        return warn(f"{facts['host']} has no /dev/shm", "Mount a tmpfs there: MPI and DataLoaders use it.")
    text = f"{size_text(free)} of {size_text(size)} are free"
    needed = len(members) * _MPI_SEGMENT
    if free < needed:
        remedy = "Enlarge it (docker run --shm-size=1g; a memory-backed emptyDir), or remove what ended jobs have left."
        return warn(f"{text} on {facts['host']}, and MPI may want {size_text(needed)}", remedy)
    return ok(text)


def huge_pages(job: Job) -> list[Finding]:
    return _on_nodes(job, _huge_pages)


def _huge_pages(facts: Facts, members: list[int]) -> Finding:
    setting = facts["huge_pages"]
    if setting in ("always", "madvise"):
        return ok(f"{setting}: buckets of gradients lie in huge pages")
    remedy = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, as root, on each host."
    return warn(f"{setting or 'not supported by the kernel'} on {facts['host']}: buckets lie in small pages", remedy)


def host_memory(job: Job) -> list[Finding]:
    """Memory of the host, what a control group leaves of it, and swap."""
    return [*_on_nodes(job, _room), *_on_nodes(job, _swap)]


def _room(facts: Facts, members: list[int]) -> Finding:
    memory = facts["memory"]
    text = f"{size_text(memory['available'])} of {size_text(memory['total'])} are available"
    free = memory["available"]
    if memory["limit"]:
        free = min(free, memory["limit"] - memory["used"])
        text += f"; a control group grants {size_text(memory['limit'])}, of which {size_text(memory['used'])} are used"
    if free < len(members) * _LEAST_PER_RANK:
        remedy = "Start fewer ranks on a host, or raise the limit (docker run --memory, Slurm's --mem)."
        return warn(f"{text}: little for {len(members)} ranks on {facts['host']}", remedy)
    return ok(text)


def _swap(facts: Facts, members: list[int]) -> Finding:
    swap, used = facts["memory"]["swap"], facts["memory"]["swap_used"]
    if used > facts["memory"]["total"] // 20:
        remedy = "Free memory there, since a rank whose pages are on disk keeps all others waiting."
        return warn(f"{size_text(used)} of {facts['host']} are swapped out", remedy)
    return ok(f"swap: {size_text(used)} of {size_text(swap)} in use" if swap else "no swap")


def limits(job: Job) -> list[Finding]:
    """Of processes: locked memory, files, processes."""
    findings = [
        finding
        for look in (_memlock, _nofile, _nproc)
        for finding in _on_nodes(job, lambda facts, members, look=look: look(facts, members, len(job.ranks)))  # type: ignore[misc]
    ]
    return [finding for finding in findings if finding.remedy] or [ok(", ".join(finding.text for finding in findings))]


def _amount(number: int) -> str:
    return "unlimited" if number < 0 else str(number)


def _memlock(facts: Facts, members: list[int], size: int) -> Finding:
    limit = facts["limits"]["memlock"]
    text = f"memlock (ulimit -l) {'unlimited' if limit < 0 else size_text(limit)}"
    if facts["rdma"] and 0 <= limit < _LEAST_LOCKED:
        remedy = (
            "Set it to unlimited (/etc/security/limits.conf; LimitMEMLOCK for slurmd; docker run --ulimit memlock=-1)."
        )
        return warn(f"{text} on {facts['host']}, whose {', '.join(facts['rdma'])} must lock memory", remedy)
    return ok(text)


def _nofile(facts: Facts, members: list[int], size: int) -> Finding:
    limit = facts["limits"]["nofile"]
    text = f"open files (ulimit -n) {_amount(limit)}"
    needed = size + _SPARE_FILES
    if 0 <= limit < needed:
        return fail(
            f"{text} on {facts['host']}: fewer than a connection for each of {size} ranks and {_SPARE_FILES} files",
            "Raise it: ulimit -n 65536 before the launcher, or /etc/security/limits.conf.",
        )
    return ok(text)


def _nproc(facts: Facts, members: list[int], size: int) -> Finding:
    limit = facts["limits"]["nproc"]
    text = f"processes (ulimit -u) {_amount(limit)}"
    if 0 <= limit < len(members) * (facts["cores_there"] + 16):
        remedy = "Raise it (ulimit -u, /etc/security/limits.conf): each thread counts."
        return warn(f"{text} on {facts['host']}: little for the threads of {len(members)} ranks", remedy)
    return ok(text)
