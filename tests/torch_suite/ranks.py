"""What runs on each rank: the tests of torch's class, one after the other, each with process groups of its own.

A test that fails on some ranks leaves others waiting in what it had begun, so all meet after each test by MPI alone.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import unittest
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from mpi4py import MPI

from .left_out import reason

LIMIT_S = 150.0
"""A rank that does not come to the end of a test by then ends the job. More than the groups' own time-outs of 60 s."""
LONG = {"test_ddp_uneven_inputs": 400.0}
"""Tests whose groups have a longer time-out."""

RUNS_AS_GLOO = ("test_accumulate_gradients",)
"""Tests that choose by the backend's name as they run, and know none but torch's own; they make no groups by it."""

STOPS = "test_barrier_timeout"
"""Tests in which an operation runs into a time-out: that stops the engine of its rank, for all groups, until it is shut
down and initialised again. Torch gives each test processes of its own, so no test counts on other groups after it."""


@dataclass
class Outcome:
    """How a test went. outcome: passed, failed, skipped or left out."""

    test: str
    outcome: str
    detail: str = ""
    seconds: float = 0.0


def load(backend: str, like: str, directory: str) -> Any:
    """Torch's module of tests, decorated for the backend `like`; collective over all ranks."""
    os.environ["PYTORCH_PRINT_REPRO_ON_FAILURE"] = "0"  # it would name this file
    import torch.distributed as dist

    world = MPI.COMM_WORLD
    os.environ.update(
        BACKEND=like,
        WORLD_SIZE=str(world.size),
        TEMP_DIR=directory,
        INIT_METHOD=f"file://{directory}/init_dir/shared_init_file",
    )
    has_mpi = dist.is_mpi_available
    if like == "mpi":
        dist.is_mpi_available = lambda: True
    import torch.testing._internal.distributed.distributed_test as module

    dist.is_mpi_available = has_mpi
    if backend != like:
        module.DistTestCases.backend_feature["plugin"].add(backend)
    if like == "gloo":
        os.environ["BACKEND"] = backend
    return module


def names_of(module: Any) -> list[str]:
    """All tests of the class, in the order of their names."""
    return unittest.TestLoader().getTestCaseNames(_class(module))


def _class(module: Any) -> type[Any]:
    return type("TorchSuite", (module.TestDistBackend, module.DistributedTest._DistTestBase), {})


class Suite:
    """The ranks of a job at work. Made on all of them alike."""

    def __init__(self, backend: str, like: str, directory: str | None = None) -> None:
        if backend == "collective":
            import collective.torch

            collective.torch.init()
        self.comm = MPI.COMM_WORLD.Dup()
        self.backend, self.like = backend, like
        if directory is None and self.comm.rank == 0:
            directory = tempfile.mkdtemp(prefix="torch_suite-")
        self.directory = self.comm.bcast(directory)
        if self.comm.rank == 0:
            for name in ("barrier", "init_dir", "test_dir", "groups"):
                Path(self.directory, name).mkdir()
        self.module = load(backend, like, self.directory)
        self.tests = _class(self.module)

    def meet(self) -> None:
        """Wait for all ranks, by MPI, and leave the cores to those that still work."""
        request = self.comm.Ibarrier()
        while not request.Test():
            time.sleep(0.001)

    def run(self, test: str, number: int) -> Outcome:
        """The test's outcome on all ranks together."""
        if self.backend == "collective" and (why_not := reason(test)):
            return Outcome(test, "left out", why_not)
        skipped = self._skipped(test)
        if skipped is not None:
            return Outcome(test, "skipped", skipped)
        faulthandler.dump_traceback_later(LONG.get(test, LIMIT_S), exit=True)
        began = time.monotonic()
        try:
            own = self._run(test, number)
        except SystemExit as left:
            own = self._left(left.code)
        except unittest.SkipTest as why:
            own = ("skipped", str(why))
        except BaseException:
            own = ("failed", traceback.format_exc())
        self.meet()
        all_of_them = self.comm.allgather(own)
        self._destroy()
        if self.backend == "collective" and (
            test.startswith(STOPS) or any(what == "failed" for what, _ in all_of_them)
        ):
            import collective.torch

            collective.torch.shutdown()
            collective.torch.init()
        self.meet()
        faulthandler.cancel_dump_traceback_later()
        return _joined(test, all_of_them, time.monotonic() - began)

    def _skipped(self, test: str) -> str | None:
        """Torch's reason, where the test was decorated with one when it was imported."""
        method = getattr(self.tests, test)
        return getattr(method, "__unittest_skip_why__", "skipped") if hasattr(method, "__unittest_skip__") else None

    def _left(self, code: Any) -> tuple[str, str]:
        from torch.testing._internal.common_distributed import TEST_SKIPS

        for skip in TEST_SKIPS.values():
            if skip.exit_code == code:
                return "skipped", skip.message
        return "failed", f"the test called sys.exit({code!r})"

    def _run(self, test: str, number: int) -> tuple[str, str]:
        import torch.distributed as dist
        from torch.testing._internal.common_utils import set_rng_seed

        module = self.module
        as_gloo = self.like == "gloo" and test.startswith(RUNS_AS_GLOO)
        module.BACKEND = "gloo" if as_gloo else self.backend
        if self.comm.rank == 0:
            for directory in ("barrier", "test_dir"):
                for file in Path(self.directory, directory).iterdir():
                    file.unlink()
        module.Barrier.barrier_id = 0
        case = self.tests(test)
        case.rank = self.comm.rank
        case.file_name = f"{self.directory}/groups/{number}"
        self.meet()
        # As with torch's own script, except that ours takes ranks and store from MPI.
        where = {} if self.backend == "collective" else {"rank": case.rank, "world_size": self.comm.size}
        if where:
            where["init_method"] = case.init_method
        seconds = module.CUSTOM_PG_TIMEOUT.get(test, module.default_pg_timeout)
        dist.init_process_group(self.backend, timeout=timedelta(seconds=seconds), **where)
        set_rng_seed(1234)
        try:
            getattr(case, test)()
        finally:
            case.doCleanups()
        return "passed", ""

    def _destroy(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def _joined(test: str, all_of_them: Sequence[tuple[str, str]], seconds: float) -> Outcome:
    failures = [f"rank {rank}:\n{text}" for rank, (what, text) in enumerate(all_of_them) if what == "failed"]
    if failures:
        return Outcome(test, "failed", "\n".join(failures), seconds)
    notes = [text for what, text in all_of_them if what == "passed"]
    if notes:
        return Outcome(test, "passed", max(notes), seconds)
    return Outcome(test, *all_of_them[0], seconds)


def run_all(
    backend: str,
    like: str,
    wanted: Callable[[str], bool],
    report: Callable[[str, Outcome | None], None],
    directory: str | None = None,
    until_failure: bool = False,
) -> bool:
    """Run the tests that are wanted.

    Args:
        backend: whose groups they run on.
        like: the backend for which torch's decorators choose.
        wanted: tells it of a test's name.
        report: is told on rank 0 of a test before (None) and after it has run.
        directory: an empty one, for what tests leave to each other; made, and removed at the end, unless it is given.
        until_failure: stop after a test that has failed.

    Returns:
        Whether none has failed.
    """
    suite = Suite(backend, like, directory)
    good = True
    for number, test in enumerate(filter(wanted, names_of(suite.module))):
        if suite.comm.rank == 0:
            report(test, None)
        outcome = suite.run(test, number)
        if suite.comm.rank == 0:
            report(test, outcome)
        good = good and outcome.outcome != "failed"
        if until_failure and not good:
            break
    suite.meet()
    if directory is None and suite.comm.rank == 0:
        shutil.rmtree(suite.directory, ignore_errors=True)
    return good


def leave(code: int) -> None:
    """End the process at once: what a failed test has begun may wait for other ranks forever, so no tidy end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """The job of a driver: `python -m torch_suite.ranks ORDER`, a file of JSON; without it, list the tests."""
    if len(sys.argv) == 1:
        print("\n".join(names_of(load("gloo", "gloo", tempfile.gettempdir()))))
        return
    order = json.loads(Path(sys.argv[1]).read_text())
    wanted = set(order["tests"])
    with open(order["results"], "a") as results:

        def report(test: str, outcome: Outcome | None) -> None:
            results.write(json.dumps({"test": test} if outcome is None else asdict(outcome)) + "\n")
            results.flush()

        good = run_all(order["backend"], order["like"], wanted.__contains__, report, order["directory"], True)
    if not good:
        leave(0)


if __name__ == "__main__":
    main()
