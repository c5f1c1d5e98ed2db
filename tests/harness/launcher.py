"""Plain `pytest`: runs the marked items on ranks that it starts, all items of a world size on the same ranks.

Items are sorted by world size, unmarked ones first. The first item of a size starts one mpirun (job.py),
whose ranks are pytest processes that collect the same files. The launcher then has them run item after item,
the next only when all ranks are done with the last, so a failure is always the item's own. Reports travel
through a socket and are shown as results come in; so `-x`, `--lf`, `-k`, `-m`, `--durations` and JUnit files
work as always.

Once an item has failed, hung or crashed on any rank, the ranks may be out of step, so they are killed and
the next item gets new ones. Not supported: `--pdb`; and warnings in ranks are not in the summary (but `-W
error` works).
"""

import signal
import time
from pathlib import Path

import mpi4py
import pytest

from harness.items import broken, in_step, limit, merge, unpack, world_size
from harness.job import Job, StartError


class Launcher:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.job: Job | None = None
        self.starts: list[tuple[int, float]] = []  # world size, seconds
        self.unstartable: set[int] = set()
        self.files: dict[int, list[Path]] = {}  # by world size
        mpi4py.rc.initialize = False  # a test module may import MPI at its top; this process is no rank
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: `timeout` leaves no ranks or files

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=world_size)
        for item in items:
            files = self.files.setdefault(world_size(item), [])
            if item.path not in files:
                files.append(item.path)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if world_size(item) == 0:
            return None  # pytest runs it
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._run(item, nextitem):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        if self.job is not None:  # stopped early
            self.job.kill()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.starts:
            each = ", ".join(f"np{size} {seconds:.1f} s" for size, seconds in self.starts)
            terminalreporter.write_line(f"mpirun: {len(self.starts)} started ({each})")

    def _run(self, item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
        size = world_size(item)
        begin = time.monotonic()
        try:
            job = self._ready_job(size)
        except StartError as error:
            return broken(item, str(error), [], {}, time.monotonic() - begin)
        begin = time.monotonic()
        last = nextitem is None or world_size(nextitem) != size
        run = job.run(item.nodeid, None if last or nextitem is None else nextitem.nodeid, limit(item))
        ranks = unpack(self.config, run.reports)
        if run.trouble:
            self.job = None
            return broken(item, run.trouble, ranks, run.outputs, time.monotonic() - begin)
        if not in_step(ranks):
            self.job = None
            job.kill()
        reports = merge(ranks)
        if last and self.job is not None:
            self.job = None
            if trouble := job.close():
                reports[-1].outcome, reports[-1].longrepr = "failed", trouble
        return reports

    def _ready_job(self, size: int) -> Job:
        """The running job, else a new one."""
        if self.job is not None:
            return self.job
        if size in self.unstartable:
            raise StartError(f"{size} ranks did not start, see the first test of this world size")
        begin = time.monotonic()
        try:
            self.job = Job(
                size,
                self.files[size],
                self._options(),
                self.config.invocation_params.dir,
                live=self.config.option.capture == "no",
            )
            self.job.wait_ready()
        except (FileNotFoundError, StartError) as error:
            self.job = None
            self.unstartable.add(size)
            raise StartError(str(error)) from error
        self.starts.append((size, time.monotonic() - begin))
        return self.job

    def _options(self) -> list[str]:
        """Our own options, as far as they bear on how a test runs or how its failure is told."""
        option = self.config.option
        options = ["--rootdir", str(self.config.rootpath), "-k", "", "-m", "", "--capture=no"]
        options += ["--tb", option.tbstyle, f"--verbosity={option.verbose}", "--assert", option.assertmode]
        options += ["--import-mode", option.importmode]
        options += ["--showlocals"] if option.showlocals else []
        options += ["--full-trace"] if option.fulltrace else []
        options += ["-c", str(self.config.inipath)] if self.config.inipath else []
        lists = {"-W": option.pythonwarnings, "-o": option.override_ini, "-p": option.plugins}
        for flag, values in lists.items():
            for value in values or ():
                options += [flag, value]
        return [*options, "-p", "no:cacheprovider"]  # which the ranks would overwrite for each other
