"""python -m collective.doctor: gather, check, report."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .. import cuda_aware, runtime
from ..config import environment_outside_the_job, launched_number, launcher_variables
from ..errors import CollectiveError
from . import checks, measure
from .facts import Facts, collect
from .findings import Level, worst
from .job import Job, Measured
from .report import as_json, as_text
from .start import start_mpi, start_runtime
from .watch import Watch

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["main"]

T = TypeVar("T")

_DESCRIPTION = "Checks a set-up: MPI, ranks, cores, memory, network, devices. Status 1 if anything fails."

_STAGE_S = 60.0  # until a stage is a hang; the slowest, pairs of nodes, takes ten
_BEHIND_S = 3.0  # for the one that reports: launchers end all processes as soon as one has failed
_DEVICES_S = 150.0  # two probes, of which each may take a minute


def main(argv: Sequence[str] | None = None) -> int:
    """Check the set-up and report it on rank 0; collective. Returns the status, alike on all ranks: 1 if any fails."""
    parser = argparse.ArgumentParser(prog="python -m collective.doctor", description=_DESCRIPTION)
    parser.add_argument("--json", metavar="FILE", help="write the findings there, too; -: to stdout, in place of text")
    options = _parsed(parser, argv)

    watch = Watch()
    with watch.stage("the facts about this process", _STAGE_S):
        facts = collect()
    try:
        with watch.stage("MPI_Init, and its first messages", _STAGE_S):
            comm = start_mpi(facts)
    except CollectiveError as error:
        job = Job([facts], error=str(error))
        if launched_number() == 0:
            return _report(job, options.json)
        time.sleep(_BEHIND_S)
        print(f"[collective.doctor] fail: {facts.get('host')}: {error}", file=sys.stderr, flush=True)
        return 1
    with watch.stage("init()", _STAGE_S):
        problem = start_runtime(comm, facts)
    job = _examine(comm, facts, problem, watch)
    status = 0
    if comm.Get_size() == 1 and launched_number() > 0:  # one of several that are each alone: the first one speaks
        time.sleep(_BEHIND_S)
        return int(worst(finding for _, finding in checks.run(job)) is Level.FAIL)
    if comm.Get_rank() == 0:
        status = _report(job, options.json)
    with watch.stage("the end", _STAGE_S):
        everywhere: int = comm.bcast(status)
    if problem and runtime.is_initialized():  # not everywhere: the others cannot take part in shutdown()
        comm.Abort(1)
    return everywhere


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; what is wrong with them is said once, by the launcher's first process."""
    if launched_number() == 0:
        return parser.parse_args(argv)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return parser.parse_args(argv)
    except SystemExit:
        time.sleep(_BEHIND_S)
        raise


def _examine(comm: MPI.Intracomm, facts: Facts, problem: str, watch: Watch) -> Job:
    """What is known of all ranks, on rank 0; on the others, of themselves. Collective."""
    measured = Measured()
    me, nodes = comm.Get_rank(), _nodes(comm.allgather(facts["node"]))
    local_size = next(len(members) for members in nodes if me in members)

    def attempt(what: str, function: Callable[[], T]) -> T | None:
        with watch.stage(what, _STAGE_S):
            try:
                return function()
            except Exception as error:  # of the MPI, the network, the engine: a line of the report
                measured.errors[what] = f"rank {me}: {type(error).__name__}: {error}"
                return None

    if len(nodes) > 1:
        measured.ways = attempt("addresses", lambda: measure.ways(comm, nodes))
        pairs = attempt("messages between nodes", lambda: measure.between_nodes(comm, nodes))
        measured.node_pairs, measured.node_pairs_left = pairs or (None, 0)
        measured.clocks = attempt("clocks", lambda: measure.clocks(comm, nodes))
    measured.local_pairs = attempt("messages within nodes", lambda: measure.within_nodes(comm, nodes))
    if not problem:
        links = measured.node_pairs or []
        found = attempt("all-reduces", lambda: measure.all_reduces(comm, facts, local_size, links))
        measured.all_reduces, measured.left_out = found or (None, "")
    with watch.stage("CUDA-aware MPI, and gathering what was found", _DEVICES_S):
        if me == 0 and facts.get("devices"):
            measured.cuda_aware = cuda_aware.find_out(several_nodes=len(nodes) > 1).how
        everyone = comm.gather((facts, measured.errors))
    if everyone is None:
        return Job([facts], problem, measured)
    for _, errors in everyone:
        measured.errors |= {what: text for what, text in errors.items() if what not in measured.errors}
    return Job([theirs for theirs, _ in everyone], problem, measured)


def _nodes(firsts: Sequence[int]) -> list[list[int]]:
    """The ranks of each node, given by rank the first one of its node."""
    return [[rank for rank, own in enumerate(firsts) if own == first] for first in dict.fromkeys(firsts)]


def _report(job: Job, file: str | None) -> int:
    """Check and write; returns the status."""
    found = checks.run(job)
    status = int(worst(finding for _, finding in found) is Level.FAIL)
    if file != "-":
        print(as_text(found, _coloured()), flush=True)
    if file is None:
        return status
    content = as_json(job, found)
    if file == "-":
        print(content, flush=True)
        return status
    try:
        Path(file).write_text(content + "\n")
    except OSError as error:
        print(f"collective.doctor: {file} cannot be written: {error}", file=sys.stderr, flush=True)
        return 1
    return status


def _coloured() -> bool:
    """Whether stdout is a terminal; the one that mpirun gives to ranks proves nothing about where its output goes."""
    environment = environment_outside_the_job()
    plain = "NO_COLOR" in environment or environment.get("TERM") == "dumb"
    return sys.stdout.isatty() and not launcher_variables() and not plain
