"""Checks of where ranks are: hosts, cores, and the threads that compute on them."""

from __future__ import annotations

from .facts import Facts
from .findings import Finding, count_text, ok, ranks_text, warn
from .job import Job

__all__ = ["cores", "ranks", "threads"]


def ranks(job: Job) -> list[Finding]:
    """How many on each host."""
    counts = [len(members) for members in job.nodes.values()]
    if len(counts) == 1:
        first = job.ranks[0]
        return [
            ok(f"{count_text(len(job.ranks), 'rank')} on {first['host']}, which has {_cores(first['cores_there'])}")
        ]
    places = ", ".join(
        f"{job.ranks[first]['host']} {len(members)} ({_cores(job.ranks[first]['cores_there'])})"
        for first, members in job.nodes.items()
    )
    text = f"{len(job.ranks)} ranks on {len(counts)} hosts: {places}"
    if len(set(counts)) > 1:
        return [warn(f"{text}: not equally many", "Give each host the same number (mpirun --map-by ppr:N:node).")]
    return [ok(text)]


def cores(job: Job) -> list[Finding]:
    """Whether each rank has cores, and more than one."""
    findings = [_cores_of_node(job, members) for members in job.nodes.values()]
    bad = [finding for finding in findings if finding.remedy]
    return bad or findings[:1]


def _cores_of_node(job: Job, members: list[int]) -> Finding:
    first = job.ranks[members[0]]
    host, there = first["host"], first["cores_there"]
    own = {rank: frozenset(job.ranks[rank]["cores"]) for rank in members}
    fair = there // len(members)
    loose = "Use mpirun --bind-to none."
    if fair > 1:
        loose = (
            f"Use mpirun --bind-to none, or --map-by slot:PE={fair} --bind-to core; in Slurm --cpus-per-task={fair}."
        )
    if crowds := _crowds(own):
        text = " and ".join(f"{ranks_text(crowd)} share {_named(subset, there)}" for subset, crowd in crowds)
        few = f"Start at most {there} ranks there, or expect each to wait until the others have been scheduled."
        return warn(f"{text} of {host}", loose if there >= len(members) else few)
    quota = first["quota"]
    if 0 < quota < len(members):
        remedy = "Raise it (docker run --cpus, a pod's cpu limit), or start fewer ranks."
        return warn(f"a control group grants {quota:g} cores' time to the {len(members)} ranks of {host}", remedy)
    single = [rank for rank in members if len(own[rank]) == 1]
    if single and there > 1:
        text = f"{ranks_text(single)} may use one core of the {there} of {host}, which computation and engine share"
        return warn(text, loose)
    least = min(map(len, own.values()))
    some = f"{least} or more" if len(set(map(len, own.values()))) > 1 else f"{least}"
    limit = f", the time of {quota:g}" if quota else ""
    return ok(f"each rank may use {some} of the {_cores(there)} of its host{limit}")


def _crowds(own: dict[int, frozenset[int]]) -> list[tuple[frozenset[int], list[int]]]:
    """Cores, and the ranks that may use no others and are more than these; without those around smaller ones."""
    found: list[tuple[frozenset[int], list[int]]] = []
    for subset in sorted(set(own.values()), key=lambda cores: (len(cores), min(cores))):
        crowd = [rank for rank, cores in own.items() if cores <= subset]
        if len(crowd) > len(subset) and not any(smaller < subset for smaller, _ in found):
            found.append((subset, crowd))
    return found


def _named(subset: frozenset[int], there: int) -> str:
    if len(subset) == there:
        return f"the {_cores(there)}"
    numbers = ", ".join(map(str, sorted(subset)))
    return f"core{'s' if len(subset) > 1 else ''} {numbers} of the {there}"


def threads(job: Job) -> list[Finding]:
    """OMP_NUM_THREADS, which torch follows, against the cores of the ranks."""
    findings = [_threads_of_node(job, members) for members in job.nodes.values()]
    bad = [finding for finding in findings if finding.remedy]
    return bad or findings[:1]


def _threads_of_node(job: Job, members: list[int]) -> Finding:
    everyone = [job.ranks[rank] for rank in members]
    usable = len({core for facts in everyone for core in facts["cores"]})
    if everyone[0]["quota"]:
        usable = max(1, min(usable, int(everyone[0]["quota"])))
    given = ", ".join(dict.fromkeys(facts["threads"] or "not set" for facts in everyone))
    count = sum(map(_threads_of, everyone))
    of = f"OMP_NUM_THREADS {given}: {count_text(count, 'thread')} of {ranks_text(members)} on {_cores(usable)}"
    if count > max(usable, len(members)):  # more ranks than cores is another check's
        fair = max(1, usable // len(members))
        return warn(f"{of} of {everyone[0]['host']}", f"Set OMP_NUM_THREADS={fair}, the cores per rank.")
    return ok(of)


def _threads_of(facts: Facts) -> int:
    first = facts["threads"].partition(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else len(facts["cores"])


def _cores(count: int) -> str:
    return count_text(count, "core")
