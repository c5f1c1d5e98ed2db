"""Checks of the start: the MPI, who has started its ranks, and whether init() works."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .findings import Finding, by_value, count_text, fail, ok, warn
from .job import Job

__all__ = ["launcher", "library", "start"]

# What other checks say with more detail.
_SAID_ELSEWHERE = re.compile(
    r"cannot share memory|holds for the whole job|share the \d+ cores of a node|bound to one core|was built for"
)


def start(job: Job) -> list[Finding]:
    if job.error:
        return [fail(f"init() fails: {job.error}", "Mend this first: no training starts without it.")]
    told = dict.fromkeys(text for facts in job.ranks for text in facts["warnings"] if not _SAID_ELSEWHERE.search(text))
    return [ok("init() succeeds"), *(warn(f"init() warns: {text}", "") for text in told)]


def library(job: Job) -> list[Finding]:
    """One MPI on all ranks, of the engine and of mpi4py, which lets several threads call it."""
    engines = [facts["mpi"]["name"] for facts in job.ranks]
    if len(set(engines)) > 1:
        return [fail(f"the ranks run with different MPIs: {by_value(engines)}", "Load the same MPI on all hosts.")]
    mine = job.ranks[0]["mpi"]
    findings = [ok(f"{mine['name']} from {mine['path']}")]
    if mine["other_version"]:
        remedy = "Install this package again with the mpicxx of the MPI in use first on PATH."
        findings = [warn(f"built for {mine['built_for']}, runs with {mine['name']} ({mine['path']})", remedy)]
    theirs = [facts.get("mpi4py_mpi", "") for facts in job.ranks]
    if "" in theirs:
        findings.append(
            fail("MPI did not start, so that mpi4py's could not be compared", "See the first line of this report.")
        )
    elif set(theirs) != set(engines):
        remedy = "Compile mpi4py for the engine's MPI (docs/troubleshooting.md), or install this package for mpi4py's."
        findings.append(fail(f"the engine's MPI is {mine['name']}, mpi4py's: {by_value(theirs)}", remedy))
    else:
        findings.append(_threads([facts["thread_level"] for facts in job.ranks]))
    return findings


def _threads(levels: Sequence[str]) -> Finding:
    if set(levels) == {"MPI_THREAD_MULTIPLE"}:
        return ok("mpi4py uses the same; MPI_THREAD_MULTIPLE")
    remedy = "Call init() before anything else initialises MPI; an MPI without MPI_THREAD_MULTIPLE has to be replaced."
    return fail(f"the engine's thread needs MPI_THREAD_MULTIPLE, and there is {by_value(levels)}", remedy)


def launcher(job: Job) -> list[Finding]:
    """Whether the launcher and MPI agree on there being several ranks."""
    mine = job.ranks[0]
    found = mine["launcher"]
    speaks = mine["process_management"] or "neither PMI nor PMIx"
    if found is None:
        if not mine["process_management"]:
            return [ok("none: this process was started by itself")]
        return [ok(f"a job of {count_text(len(job.ranks), 'rank')}, by {speaks}")]
    said = f"{found['launcher']} ({found['variable']}={found['value']}"
    if len(job.ranks) == 1:
        text = f"{said}, with {speaks}) has started {found['ranks']} processes or more, and MPI finds each alone"
        remedy = "Start ranks by the mpirun of the MPI above, or by srun with the --mpi that it speaks."
        return [fail(text, remedy)]
    return [ok(f"{said}), by {speaks}")]
