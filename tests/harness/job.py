"""One mpirun whose ranks are pytest processes that wait for orders, seen from the launcher's side."""

import contextlib
import json
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import mpirun
from harness.items import named
from harness.watchdog import STUCK_SECONDS

VARIABLE = "PYTEST_RANKS_ORDERS"  # tells a rank where its orders come from
START_SECONDS = 180.0  # 7 ranks on 2 cores import torch in turns
SETTLE_SECONDS = 3.0  # for the other ranks to come to an end of their own, when one has failed, hung or died
OVERDUE_SECONDS = STUCK_SECONDS + 10.0  # past the limit: no rank's own watchdog has done anything
END_SECONDS = 80.0  # for the ranks' own end, which their watchdogs limit to 60 s and 10 s more
# `python -m pytest` puts the working directory on sys.path, `pytest` does not: as for the launcher, so for
# the ranks, or they might import a source tree that has no extension module.
MODULE = ["-m", "pytest"]
SCRIPT = ["-c", "import sys; del sys.path[0]; import pytest; sys.exit(pytest.main())"]


class StartError(Exception):
    """The ranks did not come up; says what was seen."""


class Channel:
    """The connection to one rank: JSON lines."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.rank = -1  # until it says so
        self.pid = 0
        self.gone = False
        self.rest = b""

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; None when the rank has gone."""
        try:
            data = self.connection.recv(1 << 16)
        except ConnectionResetError:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None


@dataclass
class Run:
    """How an item went: the serialised reports of each rank; what kept it from its end, if anything did."""

    reports: list[list[dict[str, Any]]]
    trouble: str = ""
    outputs: dict[str, str] = field(default_factory=dict)  # by who printed it; filled in trouble


class Job:
    """`size` ranks, ready to run items of `files` one by one, until `close` or `kill`."""

    def __init__(self, size: int, files: Sequence[Path], options: Sequence[str], cwd: Path, live: bool) -> None:
        """Start them; `live` lets them print to our own output instead of to files."""
        mpirun.mpirun_command()  # raises without an MPI, while there is nothing to tidy up
        self.size = size
        long = len(tempfile.gettempdir()) > 80  # the path of a socket may have some 100 characters
        self.directory = Path(tempfile.mkdtemp(prefix=f"ranks{size}-", dir="/tmp" if long else None))
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.directory / "socket"))
        self.listener.listen(size)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        self.channels: list[Channel] = []
        orders = json.dumps({"directory": str(self.directory), "live": live})
        how = MODULE if str(cwd) in sys.path else SCRIPT
        with open(self.directory / "mpirun", "w") as output:
            self.process = mpirun.start(
                size,
                [*how, *map(str, files), *options],
                # TMPDIR, so that nothing of theirs or of mpirun's stays behind when they are killed.
                env={VARIABLE: orders, "PYTEST_ADDOPTS": "", "TMPDIR": str(self.directory)},
                cwd=cwd,
                stdout=None if live else output,
                stderr=None if live else subprocess.STDOUT,
            )

    def wait_ready(self) -> None:
        """Return when all ranks have collected their tests; if they do not, end them and raise StartError."""
        deadline = time.monotonic() + START_SECONDS
        trouble = ""
        while not trouble and sum(channel.rank >= 0 for channel in self.channels) < self.size:
            for channel, message in self._receive():
                if message is None:
                    trouble = trouble or f"a rank ended; {self._status()}"
                    continue
                channel.rank, channel.pid = message["rank"], message["pid"]
                if message["size"] != self.size:
                    trouble = f"mpirun is not of mpi4py's MPI, as each rank sees a world of {message['size']}"
            if time.monotonic() > deadline:
                trouble = trouble or f"not all were ready after {START_SECONDS:g} s"
            elif self.process.poll() is not None:
                trouble = trouble or self._status()
        if trouble:
            trouble = f"{self.size} ranks did not start: {trouble}"
            self._let_go(SETTLE_SECONDS)  # those that are ready can end tidily
            said = [f"--- output of {name}\n{text}" for name, text in self.kill().items() if text.strip()]
            raise StartError("\n".join([trouble, *said]))

    def run(self, item: str, nextitem: str | None, limit: float) -> Run:
        """Have all ranks run `item`, for `limit` seconds at most; after trouble this job has ended."""
        order = json.dumps({"item": item, "next": nextitem}).encode() + b"\n"
        for channel in self.channels:
            with contextlib.suppress(BrokenPipeError):  # it has died since the last item, as will be seen below
                channel.connection.sendall(order)
        run = Run([[] for _ in range(self.size)])
        running = set(range(self.size))
        ends: dict[str, list[int]] = {"done": [], "hang": [], "gone": []}  # ranks, as they came to it
        begin = time.monotonic()
        deadline = begin + limit + OVERDUE_SECONDS
        while running and time.monotonic() < deadline:
            for channel, message in self._receive():
                kind = "gone" if message is None else message["kind"]
                if message is not None and kind == "report":
                    run.reports[channel.rank].append(message["report"])
                else:
                    running.discard(channel.rank)
                    ends[kind].append(channel.rank)
                if kind == "hang":  # a stuck rank's stack is what one wants to see
                    deadline = min(deadline, time.monotonic() + STUCK_SECONDS + SETTLE_SECONDS)
                elif message is None or message.get("report", {}).get("outcome") == "failed":
                    deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
            if self.process.poll() is not None:  # a forked child of a dead rank may keep its connection open
                deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
        seconds = time.monotonic() - begin
        failed = any(report["outcome"] == "failed" for reports in run.reports for report in reports)
        if ends["hang"]:
            stuck = {*ends["hang"], *running}
            run.trouble = f"hang: {named(sorted(stuck))} of {self.size} exceeded the limit of {limit:g} s"
        elif ends["gone"] or self.process.poll() is not None:
            what = "hang" if seconds > limit else "crash"  # faulthandler ends a rank that is stuck
            who = f"{named(ends['gone'])} of {self.size} ended, in this order," if ends["gone"] else "mpirun ended"
            run.trouble = f"{what}: {who} after {seconds:.1f} s; {self._status()}"
        elif running and not failed:
            run.trouble = f"hang: no word from {named(running)} of {self.size} in {seconds:.1f} s"
        if run.trouble:
            run.outputs = self.kill()
        return run

    def close(self) -> str:
        """Let the ranks end by themselves; what went wrong, or nothing."""
        self._let_go(END_SECONDS)
        status = self._status()
        outputs = self.kill()
        if self.process.returncode == 0:
            return ""
        said = [f"--- output of {name}\n{text}" for name, text in outputs.items() if text.strip()]
        return "\n".join([f"the {self.size} ranks did not end well after their last test: {status}", *said])

    def kill(self) -> dict[str, str]:
        """End the ranks at once and remove what they left; returns what mpirun and each rank printed."""
        # Before mpirun complains that we kill the ranks.
        said = (self.directory / "mpirun").read_text(errors="replace")
        if self.process.poll() != 0:
            mpirun.kill([channel.pid for channel in self.channels if channel.pid and not channel.gone])
            try:
                self.process.wait(2.0)  # Open MPI: 0.2 s, ten times faster than on SIGTERM, and as tidy
            except subprocess.TimeoutExpired:
                mpirun.end_job(self.process)
        self.selector.close()
        for connection in (self.listener, *(channel.connection for channel in self.channels)):
            connection.close()
        files = [(f"rank {rank}", self.directory / f"rank{rank}") for rank in range(self.size)]
        outputs = {name: path.read_text(errors="replace") for name, path in files if path.exists()}
        shutil.rmtree(self.directory)
        return {"mpirun": said, **outputs}

    def _let_go(self, seconds: float) -> None:
        """Tell the ranks that no order follows, and give them some time to end."""
        for channel in self.channels:
            with contextlib.suppress(OSError):  # it has gone already
                channel.connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def _receive(self) -> Iterator[tuple[Channel, dict[str, Any] | None]]:
        """What has come in, or comes within 0.1 s, each with its sender; None when that rank has gone."""
        for key, _ in self.selector.select(0.1):
            if key.fileobj is self.listener:
                channel = Channel(self.listener.accept()[0])
                self.channels.append(channel)
                self.selector.register(channel.connection, selectors.EVENT_READ, channel)
                continue
            channel = key.data
            messages = channel.receive()
            if messages is None:
                self.selector.unregister(channel.connection)
                channel.gone = True
                yield channel, None
            for message in messages or ():
                yield channel, message

    def _status(self) -> str:
        """mpirun's exit status, which it takes a moment to have when a rank has died."""
        try:
            return f"exit status of mpirun: {self.process.wait(SETTLE_SECONDS)}"
        except subprocess.TimeoutExpired:
            return "mpirun has not ended"
