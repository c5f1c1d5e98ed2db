"""How the ranks of a job are, told by rank 0: to `collective top`, at a socket that only the job's user can open, and
to Prometheus.

Each rank answers for itself out of band (outofband.py), while its script computes, waits or hangs. Rank 0 asks all of
them when it is asked itself, and only then: who is not watched pays for nothing but the counters of the engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import _core, counters, jobs, ledger
from .config import LogLevel, slurm_job
from .errors import InvalidArgumentError
from .runtime import Runtime

__all__ = ["start"]

_END_S = 1.0
_PATIENCE_S = 2.0  # with whoever has connected, and with each rank
_PAUSE_S = 1.0  # after an error of this process's, such as too many open files
_LONGEST = 100  # characters of a question

Report = dict[str, Any]
"""As docs/watching.md has it."""


def start(state: Runtime) -> None:
    """Have this job watched, until its engine has shut down; collective.

    Raises:
        InvalidArgumentError: on all ranks, where rank 0 cannot serve what COLLECTIVE_METRICS asks for.
    """
    if state.channel is not None:
        state.channel.answers["statistics"] = lambda about: asdict(counters.of_engine(state.engine))
    wrong = None
    if state.topology.rank == 0:
        wrong = _serve(state)  # its ends come first in at_end, because they need the channel
    if (wrong := state.comm.bcast(wrong)) is not None:
        raise InvalidArgumentError(wrong)


def _serve(state: Runtime) -> str | None:
    """What is wrong, if it cannot be done as it was asked for."""
    if not state.config.out_of_band:
        return "COLLECTIVE_METRICS has no use with COLLECTIVE_OUT_OF_BAND=0" if state.config.metrics else None
    reporter = _Reporter(state)
    wrong = _serve_metrics(state, reporter)
    if wrong is None:
        _open_door(state, reporter)
    return wrong


def _open_door(state: Runtime, reporter: _Reporter) -> None:
    name = ".".join(filter(None, (slurm_job(), str(os.getpid()))))
    try:
        door = _Door(name, {"job": reporter.job, "report": reporter.report})
    except OSError as error:  # the job itself is none the worse
        _core.log(LogLevel.WARNING, f"`collective top` will not see this job: {error.strerror or error}")
        return
    state.at_end.insert(0, door.close)
    state.in_child.append(door.close_in_child)


def _serve_metrics(state: Runtime, reporter: _Reporter) -> str | None:
    if state.config.metrics is None:
        return None
    host, port = state.config.metrics
    try:
        from . import metrics
    except ImportError:
        return "COLLECTIVE_METRICS: rank 0 has no prometheus_client; pip install 'collective[metrics]' brings it"
    try:
        server = metrics.Server(host, port, reporter.report)
    except OSError as error:
        return f"COLLECTIVE_METRICS: rank 0 cannot serve at {host}, port {port}: {error.strerror}"
    state.at_end.insert(0, server.close)
    state.in_child.append(server.close_in_child)
    return None


class _Reporter:
    """Rank 0's, of all ranks."""

    def __init__(self, state: Runtime) -> None:
        self._state = state
        self._host = socket.gethostname()
        self._started = time.time()
        self._late: Mapping[int, float] | None = None

    def job(self) -> Report:
        """What can be told without asking anybody."""
        return {
            "pid": os.getpid(),
            "slurm_job": slurm_job(),
            "host": self._host,
            "program": Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python",
            "ranks": self._state.topology.size,
            "started": self._started,
        }

    def report(self) -> Report:
        """The job, and each of its ranks."""
        return {"job": self.job(), "ranks": self._ranks()}

    def _ranks(self) -> list[Report]:
        channel, size = self._state.channel, self._state.topology.size
        if channel is None:
            own = _rank(0, self._host, os.getpid(), asdict(counters.of_engine(self._state.engine)))
            unheard = "there is no address at which all nodes reach each other"
            return [own, *(_rank(rank, "-", None, None, silence=unheard) for rank in range(1, size))]
        from .outofband import Silence

        answers = channel.ask(range(size), "statistics", seconds=_PATIENCE_S)
        late = self._lateness()
        ranks = []
        for rank, process in enumerate(channel.processes):
            answer = answers[rank]
            if isinstance(answer, Silence):
                ranks.append(_rank(rank, process.host, process.pid, None, silence=answer.value))
            else:
                seconds = None if late is None else late.get(rank, 0.0)
                ranks.append(_rank(rank, process.host, process.pid, answer, late=seconds))
        return ranks

    def _lateness(self) -> Mapping[int, float] | None:
        """By rank, for how many seconds in all the others have waited for it; what was last known of it."""
        late = ledger.costs(self._state.engine)
        if late is not None:
            self._late = late
        return self._late


def _rank(
    rank: int,
    host: str,
    pid: int | None,
    statistics: Report | None,
    *,
    silence: str | None = None,
    late: float | None = None,
) -> Report:
    return {
        "rank": rank,
        "host": host,
        "pid": pid,
        "silence": silence,
        "late_seconds": late,
        "statistics": statistics,
    }


class _Door:
    """Rank 0's socket."""

    def __init__(self, name: str, answers: Mapping[str, Callable[[], Report]]) -> None:
        self._answers = answers
        self._listener, self._path = jobs.listen(name)
        self._is_closed = threading.Event()
        self._has_complained = False
        self._thread = threading.Thread(target=self._run, name="collective watching", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._is_closed.is_set():
                    return
                self._complain(error)
                self._is_closed.wait(_PAUSE_S)
                continue
            with connection:
                connection.settimeout(_PATIENCE_S)
                self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection.makefile("rb") as asked:
                question = asked.readline(_LONGEST).decode(errors="replace").strip()
        except OSError:  # whoever asked is gone
            return
        if question not in self._answers:
            return
        try:
            answer = json.dumps(self._answers[question]()).encode()
        except Exception as error:  # there are others to answer
            self._complain(error)
            return
        with contextlib.suppress(OSError):
            connection.sendall(answer)

    def _complain(self, error: Exception) -> None:
        """Once: `collective top` may ask every second."""
        if not self._has_complained:
            self._has_complained = True
            _core.log(LogLevel.WARNING, f"`collective top` was not answered: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Answer nobody any more."""
        self._is_closed.set()
        self._path.unlink(missing_ok=True)
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(_END_S)
        self._listener.close()

    def close_in_child(self) -> None:
        """After a fork: a child must not seem to be the job when this process is gone."""
        self._listener.close()
