"""A pytest process that is an MPI rank: it runs its items in step with the other ranks, under a watchdog.

OrderedRank does so on the launcher's orders. LockstepRank is for somebody's own `mpirun -n N python -m
pytest`: all ranks collect the same items of world size N and exchange their reports after each, so that rank
0 shows the failures of all, and all stop alike. Unmarked tests are left out there: they want one process,
and some start an mpirun, which cannot be done inside another. After a failure nobody starts the ranks
afresh, as the launcher does, so a later failure may be its consequence; `-x` stops at the first.
"""

import contextlib
import faulthandler
import json
import os
import queue
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol  # for the reports of an item before they are shown

from harness.items import DEFAULT_LIMIT, limit, merge, pack, unpack, world_size
from harness.watchdog import OWN_THREAD, Watchdog

TELL_SECONDS = 2.0  # for the other ranks, at their limit as well, to tell their state before one ends them all


class Rank:
    """What both kinds of rank share: the world, the watchdog, and silence."""

    def __init__(self, config: pytest.Config) -> None:
        from mpi4py import MPI

        self.config = config
        self.comm = MPI.COMM_WORLD.Dup()  # no message of a test's is taken for one of ours
        self.rank, self.size = self.comm.rank, self.comm.size
        self.silent = True
        self.nowhere = open(os.devnull, "w")  # noqa: SIM115
        self.watchdog = Watchdog(config, f"rank {self.rank} of {self.size}", self.end)

    def end(self, what: str) -> None:
        """End the job as `what` takes too long; runs in the watchdog's thread."""
        raise NotImplementedError

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if self.silent:
            # The reporter must stay, as assertions ask it for colours.
            reporter: Any = self.config.pluginmanager.get_plugin("terminalreporter")
            reporter._tw._file = self.nowhere

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.silent:
            print(f"{self.watchdog.name}: {report.nodeid}\n{report.longreprtext}", file=self.watchdog.stderr)

    def pytest_internalerror(self, excrepr: object) -> None:
        if self.silent:
            print(f"{self.watchdog.name}: internal error\n{excrepr}", file=self.watchdog.stderr)


class OrderedRank(Rank):
    """A rank of the launcher's: runs the item that it is told to, and sends each report at once."""

    def __init__(self, config: pytest.Config, directory: Path, live: bool) -> None:
        from mpi4py import MPI

        self.directory = directory
        rank = MPI.COMM_WORLD.rank
        self.output = None if live else directory / f"rank{rank}"
        if self.output is not None:
            # Not pytest's capture, whose file is lost with the process when a test crashes.
            with open(self.output, "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
        super().__init__(config)
        config.option.basetemp = directory / f"tmp{rank}"
        self.launcher = socket.socket(socket.AF_UNIX)
        self.launcher.connect(str(directory / "socket"))
        self.sending = threading.Lock()
        self.orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.busy = False
        threading.Thread(target=self._listen, name=OWN_THREAD, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(ConnectionResetError):  # another way to learn of the connection's end
            for line in self.launcher.makefile():
                self.busy = True
                self.orders.put(json.loads(line))
        if self.busy:
            shutil.rmtree(self.directory, ignore_errors=True)  # by the first rank that comes to it
            os._exit(1)  # the launcher is gone, and nobody else would end this job
        self.orders.put(None)

    def send(self, kind: str, **content: Any) -> None:
        with self.sending:
            self.launcher.sendall(json.dumps({"kind": kind, **content}, default=repr).encode() + b"\n")

    def end(self, what: str) -> None:
        if not self.busy:  # the session ends, and no launcher listens
            time.sleep(TELL_SECONDS)
            os._exit(1)
        # The launcher kills all ranks once each has told its state: do not end before a slower one has.
        faulthandler.cancel_dump_traceback_later()
        self.send("hang", what=what)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("a test file cannot be collected on this rank")
        items = {item.nodeid: item for item in session.items}
        self.send("ready", rank=self.rank, size=self.size, pid=os.getpid())
        while (order := self.orders.get()) is not None:
            item, nextitem = items[order["item"]], items.get(order["next"])
            if self.output is not None:
                os.truncate(self.output, 0)
            with self.watchdog.watch(item.nodeid, limit(item)):
                self.config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
            self.busy = False
            self.send("done")
        self.watchdog.arm("the end of the session", DEFAULT_LIMIT)  # fixtures, MPI_Finalize
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.output is not None and (text := self.output.read_text(errors="replace")):
            report.sections.append(("Captured output", text))
        self.send("report", report=pack(self.config, report))


class LockstepRank(Rank):
    """A rank under somebody's mpirun; the same on all ranks, save that only rank 0 shows what it does."""

    def __init__(self, config: pytest.Config) -> None:
        super().__init__(config)
        self.silent = self.rank != 0
        if self.silent:
            # The name by which pytest itself knows a process that must not write its cache or a JUnit file.
            config.workerinput = {"workerid": f"rank{self.rank}"}  # type: ignore[attr-defined]

    def end(self, what: str) -> None:
        time.sleep(TELL_SECONDS)
        self.comm.Abort(1)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        others = [item for item in items if world_size(item) != self.size]
        items[:] = [item for item in items if world_size(item) == self.size]
        self.config.hook.pytest_deselected(items=others)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        collected = (session.testsfailed, [item.nodeid for item in session.items])
        with self.watchdog.watch("the exchange of what was collected", DEFAULT_LIMIT):
            everyone = self.comm.allgather(collected)
        odd = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
        if odd:
            raise pytest.UsageError(f"ranks {odd} collected other tests than rank 0, or with other errors")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        with self.watchdog.watch(item.nodeid, limit(item)):
            reports = runtestprotocol(item, log=False, nextitem=nextitem)
            everyone = self.comm.allgather([pack(self.config, report) for report in reports])
        for report in merge(unpack(self.config, everyone)):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        # mpirun kills the others when a rank exits with an error: not before rank 0 has printed its summary.
        sys.stdout.flush()
        with self.watchdog.watch("the end of the session on the other ranks", DEFAULT_LIMIT):
            self.comm.Barrier()
