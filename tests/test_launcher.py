"""The launcher, by runs of pytest on small test files: every way in which a rank can fail fails the test."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import fill
from harness.mpirun import descendants, environment, run_ranks, under_mpi

HERE = Path(__file__).parent
PLUGIN = "pytest_plugins = ['harness.plugin']\n"
HEADER = "import os, sys, time\nimport pytest\nfrom mpi4py import MPI\ncomm = MPI.COMM_WORLD\n"


class Project:
    """A directory with a test file, and pytest run in it."""

    def __init__(self, directory: Path, code: str, conftest: str = "") -> None:
        self.directory = directory / "project"
        self.temporary = directory / "tmp"
        self.directory.mkdir()
        self.temporary.mkdir()
        (self.directory / "conftest.py").write_text(textwrap.dedent(conftest) + PLUGIN)
        (self.directory / "test_it.py").write_text(HEADER + textwrap.dedent(code))
        self.env = {"PYTHONPATH": str(HERE), "TMPDIR": str(self.temporary)}
        self.arguments = ["-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider"]

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, *self.arguments, *arguments],
            cwd=self.directory,
            env={**environment(), **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def pytest(self, *arguments: str) -> tuple[int, str]:
        """Exit status and output of plain pytest, which must leave nothing in the temporary directory."""
        with self.start(*arguments) as process:
            try:
                output, _ = process.communicate(timeout=100)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                raise
        assert list(self.temporary.iterdir()) == []
        return process.returncode, output

    def under_mpirun(self, size: int, *arguments: str) -> tuple[int, str]:
        done = run_ranks(size, [*self.arguments, *arguments], 60, env=self.env, cwd=self.directory)
        return done.returncode, done.stdout + done.stderr


MakeProject = Callable[..., Project]


@pytest.fixture
def project(tmp_path: Path) -> MakeProject:
    return lambda code, conftest="": Project(tmp_path, code, conftest)


def outcomes(output: str) -> dict[str, str]:
    """What `pytest -v` says of each item."""
    return dict(re.findall(r"test_it\.py::(\S+) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)", output))


def failure(output: str, item: str) -> str:
    """What pytest tells of one failure."""
    title = rf"^_+ (?:ERROR at teardown of )?{re.escape(item)} _+$"
    match = re.search(title + r"(.*?)^(?:_{3,} .* _{3,}|={3,} .* ={3,}|mpirun: .*)$", output, re.MULTILINE | re.DOTALL)
    assert match, f"no failure of {item} in\n{output}"
    return match[1]


@pytest.mark.slow
def test_every_world_size_once(project: MakeProject) -> None:
    status, output = project(
        """
        def test_unmarked():
            assert not MPI.Is_initialized()

        @pytest.mark.ranks(1, 2, 3, 4, 7)
        @pytest.mark.parametrize("dtype", ["f4", "f8"])
        def test_sum(ranks, dtype):
            assert comm.size == ranks
            assert comm.allreduce(comm.rank) == ranks * (ranks - 1) // 2

        class TestClass:
            @pytest.mark.ranks(3)
            def test_own_directory(self, tmp_path):
                assert len(set(comm.allgather(str(tmp_path)))) == 3
        """
    ).pytest()
    assert status == 0, output
    expected = ["test_unmarked", "TestClass::test_own_directory[np3]"]
    expected += [f"test_sum[np{size}-{dtype}]" for size in (1, 2, 3, 4, 7) for dtype in ("f4", "f8")]
    assert outcomes(output) == dict.fromkeys(expected, "PASSED")
    assert "mpirun: 5 started" in output


@pytest.mark.slow
def test_failures_are_told_and_the_rest_goes_on(project: MakeProject) -> None:
    status, output = project(
        """
        @pytest.mark.ranks(3)
        def test_two_fail():
            print("said by", comm.rank)
            os.write(2, b"written raw\\n")
            assert comm.rank == 0

        @pytest.mark.ranks(3)
        def test_one_fails_and_others_wait():
            if comm.rank == 2:
                raise ValueError("alone")
            comm.Barrier()

        @pytest.fixture
        def bad_end():
            yield
            assert comm.rank == 1

        @pytest.mark.ranks(3)
        def test_teardown_fails(bad_end):
            pass

        @pytest.mark.ranks(3)
        def test_skipped():
            pytest.skip("not today")

        @pytest.mark.ranks(3)
        @pytest.mark.xfail(reason="known")
        def test_expected_to_fail():
            assert comm.rank != 1

        @pytest.mark.ranks(3)
        def test_good():
            comm.Barrier()
        """
    ).pytest("-rs")
    assert status == 1
    assert outcomes(output) == {
        "test_two_fail[np3]": "FAILED",
        "test_one_fails_and_others_wait[np3]": "FAILED",
        "test_teardown_fails[np3]": "ERROR",
        "test_skipped[np3]": "SKIPPED",
        "test_expected_to_fail[np3]": "XFAIL",
        "test_good[np3]": "PASSED",
    }
    told = failure(output, "test_two_fail[np3]")
    assert "failed on ranks 1, 2 of 3; the traceback above is of rank 1" in told
    assert re.search(r"rank 2: call: .*assert 2 == 0 \(.*test_it.py:\d+\)", told)
    assert "said by 1\nwritten raw" in told
    assert "said by 2" in told
    assert "said by 0" not in told
    told = failure(output, "test_one_fails_and_others_wait[np3]")
    assert "ValueError: alone" in told
    assert "still running when this world was ended: ranks 0, 1" in told
    assert "failed on ranks 0, 2 of 3" in failure(output, "test_teardown_fails[np3]")
    assert "not today" in output


@pytest.mark.slow
def test_hangs_and_crashes_are_told_and_the_rest_goes_on(project: MakeProject) -> None:
    status, output = project(
        """
        @pytest.mark.ranks(2)
        @pytest.mark.limit(1)
        def test_hang(capfd):
            with capfd.disabled():
                print("said by", comm.rank)
            comm.recv() if comm.rank == 0 else time.sleep(99)

        @pytest.mark.ranks(2)
        def test_exit():
            print("said by", comm.rank)
            os._exit(42) if comm.rank == 1 else comm.Barrier()

        @pytest.mark.ranks(2)
        def test_killed():
            os.kill(os.getpid(), 9) if comm.rank == 0 else comm.Barrier()

        @pytest.mark.ranks(2)
        def test_abort():
            comm.Abort(5) if comm.rank == 0 else comm.Barrier()

        @pytest.mark.ranks(2)
        def test_good():
            comm.Barrier()
        """
    ).pytest()
    assert status == 1
    found = outcomes(output)
    assert len(found) == 5
    assert found.pop("test_good[np2]") == "PASSED"
    assert set(found.values()) == {"FAILED"}
    told = failure(output, "test_hang[np2]")
    assert "hang: ranks 0, 1 of 2 exceeded the limit of 1 s" in told
    assert "rank 0 of 2: hang: test_it.py::test_hang[np2] exceeded its limit of 1 s" in told
    assert told.count("comm.recv() if comm.rank == 0 else time.sleep(99)") == 2  # of the stacks
    assert told.count("its engine:\nnot initialised") == 2
    assert "said by 0" in told
    assert "said by 1" in told
    told = failure(output, "test_exit[np2]")
    assert re.search(r"crash: ranks? 1.* ended, in this order, after .*; exit status of mpirun: 42", told)
    assert "said by 1" in told
    assert "crash: rank" in failure(output, "test_killed[np2]")
    assert "exit status of mpirun: 5" in failure(output, "test_abort[np2]")


@pytest.mark.slow
def test_ranks_that_no_watchdog_of_their_own_can_end(project: MakeProject) -> None:
    status, output = project(
        """
        import ctypes

        @pytest.mark.ranks(2)
        @pytest.mark.limit(1)
        def test_gil_never_given_back():
            ctypes.PyDLL(None).sleep(99) if comm.rank == 1 else time.sleep(99)

        @pytest.mark.ranks(2)
        @pytest.mark.limit(1)
        def test_all_stopped():
            os.kill(os.getpid(), 19)

        @pytest.mark.ranks(2)
        def test_good():
            comm.Barrier()
        """,
        "from harness import watchdog\nwatchdog.STUCK_SECONDS = 1\nfrom harness import job\njob.OVERDUE_SECONDS = 3\n",
    ).pytest()
    assert status == 1
    assert outcomes(output)["test_good[np2]"] == "PASSED"
    told = failure(output, "test_gil_never_given_back[np2]")
    assert "hang: ranks 0, 1 of 2" in told or "hang: rank 0 of 2" in told
    assert "Timeout (0:00:02)!" in told  # faulthandler's, of rank 1
    assert "hang: no word from ranks 0, 1 of 2" in failure(output, "test_all_stopped[np2]")


def test_bad_end_of_the_last_test_is_told(project: MakeProject) -> None:
    status, output = project(
        """
        import atexit

        @pytest.mark.ranks(2)
        def test_last():
            if comm.rank == 1:
                atexit.register(os._exit, 7)
        """
    ).pytest()
    assert status == 1
    assert "did not end well after their last test: exit status of mpirun: 7" in failure(output, "test_last[np2]")


def test_ranks_that_do_not_start(project: MakeProject) -> None:
    status, output = project(
        """
        @pytest.mark.ranks(2)
        @pytest.mark.parametrize("n", range(3))
        def test_it(n):
            pass

        @pytest.mark.ranks(3)
        def test_other_size():
            pass
        """,
        """
        from harness import mpirun
        start = mpirun.start  # what ranks see under the mpirun of another MPI than mpi4py's: worlds of one
        mpirun.start = lambda size, *args, **kwargs: start(1, *args, **kwargs)
        """,
    ).pytest()
    assert status == 1
    assert set(outcomes(output).values()) == {"FAILED"}
    assert "2 ranks did not start: mpirun is not of mpi4py's MPI" in failure(output, "test_it[np2-0]")
    assert "see the first test of this world size" in failure(output, "test_it[np2-2]")


def test_a_file_that_only_ranks_cannot_import(project: MakeProject) -> None:
    status, output = project(
        """
        if MPI.Is_initialized():
            raise ImportError("only there")

        @pytest.mark.ranks(2)
        def test_it():
            pass
        """
    ).pytest()
    assert status == 1
    told = failure(output, "test_it[np2]")
    assert "2 ranks did not start" in told
    assert "ImportError: only there" in told


def test_options(project: MakeProject) -> None:
    ready = project(
        """
        @pytest.mark.ranks(1, 2)
        @pytest.mark.parametrize("n", [0, 1])
        def test_it(n):
            print("shown at once")
            assert n == 0
        """
    )
    status, output = ready.pytest("-x", "-s", "--tb=line", "test_it.py", "--junitxml=result.xml")
    assert status == 1
    assert "test_it.py::test_it[np1-1] shown at once\n" in output
    assert re.findall(r"^FAILED test_it.py::(\S+)", output, re.MULTILINE) == ["test_it[np1-1]"]
    assert "1 failed, 1 passed in" in output
    assert 'tests="2"' in (ready.directory / "result.xml").read_text()
    ready.arguments.remove("no:cacheprovider")
    ready.arguments.remove("-p")
    assert ready.pytest("-k", "np2")[0] == 1
    status, output = ready.pytest("--lf")
    assert outcomes(output) == {"test_it[np2-1]": "FAILED"}


def test_world_fixture(project: MakeProject) -> None:
    ready = project(
        """
        import collective

        @pytest.mark.ranks(2)
        def test_first(world):
            assert (world.rank, world.size, world.comm.size) == (comm.rank, 2, 2)
            collective.shutdown()

        @pytest.mark.ranks(2)
        def test_again(world):
            assert collective.is_initialized()
            assert collective.calls == ["init", "shutdown", "init"]

        @pytest.mark.ranks(2)
        @pytest.mark.limit(1)
        def test_hang(world):
            time.sleep(99)

        def test_unmarked(world):
            pass
        """
    )
    package = ready.directory / "collective"
    package.mkdir()
    (package / "__init__.py").write_text(
        """
calls = []
def init(): calls.append("init")
def shutdown(): calls.append("shutdown")
def is_initialized(): return calls[-1:] == ["init"]
def rank(): from mpi4py import MPI; return MPI.COMM_WORLD.rank
def size(): from mpi4py import MPI; return MPI.COMM_WORLD.size
from . import runtime
"""
    )
    (package / "runtime.py").write_text("def describe(): return 'one allreduce in flight'")
    status, output = ready.pytest()
    assert status == 1
    assert list(outcomes(output).values()) == ["ERROR", "PASSED", "PASSED", "FAILED"]
    assert failure(output, "test_hang[np2]").count("its engine:\none allreduce in flight") == 2
    assert "is for tests marked with pytest.mark.ranks" in output


def test_under_mpirun(project: MakeProject) -> None:
    ready = project(
        """
        def test_unmarked():
            assert False

        @pytest.mark.ranks(2)
        def test_other_size():
            assert False

        @pytest.mark.ranks(3)
        def test_good():
            comm.Barrier()

        @pytest.mark.ranks(3)
        def test_one_fails():
            print("said by", comm.rank)
            assert comm.rank != 2

        @pytest.mark.ranks(3)
        @pytest.mark.limit(1)
        def test_hang():
            print("said by", comm.rank)
            comm.Barrier() if comm.rank else time.sleep(99)
        """
    )
    status, output = ready.under_mpirun(3, "-k", "not hang")
    assert status == 1
    assert outcomes(output) == {"test_good[np3]": "PASSED", "test_one_fails[np3]": "FAILED"}
    told = failure(output, "test_one_fails[np3]")
    assert "failed on rank 2 of 3" in told
    assert "said by 2" in told
    assert output.count("1 failed, 1 passed, 3 deselected") == 1
    status, output = ready.under_mpirun(3, "-k", "good")
    assert status == 0
    assert output.count("test session starts") == 1
    status, output = ready.under_mpirun(3, "-k", "hang")
    assert status != 0
    for rank in range(3):
        assert f"rank {rank} of 3: hang: test_it.py::test_hang[np3] exceeded its limit of 1 s" in output
        assert f"said by {rank}" in output


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_a_killed_launcher(project: MakeProject, how: signal.Signals) -> None:
    ready = project(
        """
        @pytest.mark.ranks(2)
        def test_hang():
            open(f"running{comm.rank}", "w").close()
            time.sleep(50)
        """
    )
    with ready.start() as process:
        wait_for(lambda: len(list(ready.directory.glob("running?"))) == 2)
        processes = descendants(process.pid)
        assert len(processes) >= 3  # mpirun and two ranks
        process.send_signal(how)
    wait_for(lambda: not any(map(runs, processes)))
    assert list(ready.temporary.iterdir()) == []


def test_no_rank_outlives_a_killed_mpirun(project: MakeProject) -> None:
    ready = project(
        """
        @pytest.mark.ranks(2)
        def test_kills_mpirun():
            print("process", os.getpid())
            comm.Barrier()
            if comm.rank == 0:
                os.kill(os.getsid(0), 9)  # mpirun leads the session
            time.sleep(50)

        @pytest.mark.ranks(2)
        def test_good():
            comm.Barrier()
        """
    )
    ready.env["OMPI_MCA_btl"] = "self,tcp"  # without files in /dev/shm, as a killed mpirun removes none
    status, output = ready.pytest()
    assert status == 1
    assert outcomes(output) == {"test_kills_mpirun[np2]": "FAILED", "test_good[np2]": "PASSED"}
    pids = re.findall(r"^process (\d+)", failure(output, "test_kills_mpirun[np2]"), re.MULTILINE)
    assert len(pids) == 2
    wait_for(lambda: not any(runs(int(pid)) for pid in pids))


@pytest.mark.parametrize(
    ("names", "is_rank"),
    [
        ("", False),
        ("OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK PMIX_RANK", True),
        ("PMI_SIZE PMI_RANK", True),
        ("PMIX_RANK PMIX_NAMESPACE", True),
        ("SLURM_NTASKS SLURM_PROCID", False),
        ("SLURM_NTASKS SLURM_PROCID PMI2_FOO", True),
        ("OMPI_MCA_osc OMPI_ALLOW_RUN_AS_ROOT PMIX_MCA_gds", False),
    ],
)
def test_under_mpi(monkeypatch: pytest.MonkeyPatch, names: str, is_rank: bool) -> None:
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "SLURM_")):
            monkeypatch.delenv(name)
    for name in names.split():
        monkeypatch.setenv(name, "1")
    assert under_mpi() == is_rank


def test_run_ranks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\nfrom mpi4py import MPI\n"
        "line = ['rank', MPI.COMM_WORLD.rank, os.environ['OMP_NUM_THREADS'], os.environ.get('MORE')]\n"
        "os.write(1, (' '.join(map(str, line)) + '\\n').encode())\n"
        "open(f'pid{MPI.COMM_WORLD.rank}', 'w').write(str(os.getpid()))\n"
        "time.sleep(float(sys.argv[1])) if len(sys.argv) > 1 else sys.exit(MPI.COMM_WORLD.rank)\n"
    )
    done = run_ranks(2, script, 30, env={"MORE": "yes"}, cwd=tmp_path)
    assert done.returncode == 1
    assert sorted(done.stdout.splitlines())[:2] == ["rank 0 1 yes", "rank 1 1 yes"]
    with pytest.raises(pytest.fail.Exception, match=r"(?s)hang: .* on 2 ranks exceeded 5 s.*rank [01] 1 None"):
        run_ranks(2, [script, "99"], 5, cwd=tmp_path)
    for rank in range(2):
        assert not runs(int((tmp_path / f"pid{rank}").read_text()))


@pytest.mark.parametrize("dtype", ["u1", "i1", "i4", "f2", "f4", "f8"])
def test_fill(dtype: str) -> None:
    ranks = np.stack([fill((5, 41), dtype, rank) for rank in range(7)])
    assert ranks.dtype == dtype
    assert all(len(set(column)) == 7 for column in ranks.reshape(7, -1).T)
    exact = ranks.astype(np.float64).sum(0)
    assert np.array_equal(ranks.sum(0, dtype=dtype).astype(np.float64), exact)
    assert np.abs(exact).max() <= 127
    flat = ranks[0].ravel()
    assert max(np.mean(flat[shift:] == flat[:-shift]) for shift in range(1, 100)) < 0.25
    assert not np.array_equal(ranks[0], fill((5, 41), dtype, 0, salt=1))


def runs(pid: int) -> bool:
    """Whether it is still there, and not a zombie that waits for whatever is process 1 here."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
