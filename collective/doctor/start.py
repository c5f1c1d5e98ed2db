"""The start of MPI and of the runtime, step by step, so that a step that fails on one rank is known to all."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from types import TracebackType
from typing import TYPE_CHECKING

from .. import launcher, lifecycle, mpi, process, runtime
from ..config import Config, override
from ..errors import CollectiveError
from .facts import Facts
from .findings import ranks_text

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["start_mpi", "start_runtime"]

_CANNOT_SHARE = re.compile(r"cannot share memory: (.*)")


def start_mpi(facts: Facts) -> MPI.Intracomm:
    """A communicator of all ranks, and the facts that it takes; raises CollectiveError where there cannot be one."""
    process.refuse_child()
    process.refuse_heir()
    mpi.start()
    from mpi4py import MPI

    levels = {
        MPI.THREAD_SINGLE: "MPI_THREAD_SINGLE",
        MPI.THREAD_FUNNELED: "MPI_THREAD_FUNNELED",
        MPI.THREAD_SERIALIZED: "MPI_THREAD_SERIALIZED",
        MPI.THREAD_MULTIPLE: "MPI_THREAD_MULTIPLE",
    }
    facts["thread_level"] = levels[MPI.Query_thread()]
    facts["mpi4py_mpi"] = mpi.name_and_version(MPI.Get_library_version())
    comm = MPI.COMM_WORLD.Dup()
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    facts["node"] = node.bcast(comm.Get_rank())
    node.Free()
    return comm


def start_runtime(comm: MPI.Intracomm, facts: Facts) -> str:
    """init(); collective. Returns why it failed, alike on all ranks; "" for success."""
    # Before anything collective: one rank that stops here would leave the others waiting.
    problem = ""
    try:
        wanted = Config.from_environment().shared_memory
        launcher.check(comm.Get_size())
    except CollectiveError as error:
        problem = str(error)
    if problem := _of_all(comm, problem):
        return problem
    # What init() warns of is read here, whatever the user wants to see of it; and a timeline or trace that the user has
    # recorded is not to be overwritten.
    override(LOG_LEVEL="warning", TIMELINE="", TRACE="")
    with _Stderr() as stderr:
        try:
            lifecycle.init()
        except CollectiveError as error:
            problem = str(error)
    facts["warnings"] = stderr.warnings
    if problem := _of_all(comm, problem):
        return problem
    facts["shared_memory"] = _why_not_shared(comm, wanted, stderr.warnings, facts["node"])
    return ""


def _of_all(comm: MPI.Intracomm, problem: str) -> str:
    """The problems of all ranks, as one text."""
    problems = comm.allgather(problem)
    if len(set(problems)) == 1:
        return problem
    found = dict.fromkeys(filter(None, problems))
    return "; ".join(f"{ranks_text([r for r, own in enumerate(problems) if own == text])}: {text}" for text in found)


def _why_not_shared(comm: MPI.Intracomm, wanted: bool, warnings: list[str], node: int) -> str:
    """Why the ranks of this node do not share memory; "" if they do, or if this one is alone. Collective."""
    told = next((found[1] for text in warnings if (found := _CANNOT_SHARE.search(text))), "")
    everyone = comm.allgather((node, wanted, told))
    members = [entry for entry in everyone if entry[0] == node]
    unwanted = [not wish for _, wish, _ in everyone]
    if len(members) == 1:
        return ""
    if any(unwanted):
        return f"COLLECTIVE_SHARED_MEMORY=0 on {unwanted.count(True)} of {len(unwanted)} ranks"
    reason = next((text for *_, text in members if text), "")  # the first rank of the node has been told
    if not reason and len(members) == len(everyone) and not runtime.current().engine.shares_memory():
        return "the engine gives no reason"
    return reason


class _Stderr:
    """What the engine says while this is entered is kept; the rest is passed on at the end."""

    def __enter__(self) -> _Stderr:
        self.warnings: list[str] = []
        sys.stderr.flush()
        self._real = os.dup(2)
        self._file = tempfile.TemporaryFile()
        os.dup2(self._file.fileno(), 2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stderr.flush()
        os.dup2(self._real, 2)
        os.close(self._real)
        self._file.seek(0)
        for line in self._file.read().decode(errors="replace").splitlines():
            if found := re.fullmatch(r"\[collective\] (?:rank \d+: )?(.*)", line):
                self.warnings.append(found[1])
            else:
                print(line, file=sys.stderr)
        self._file.close()
