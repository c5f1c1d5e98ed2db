"""How a job ends: well, by an exception, by an exit of one rank, by a signal; always within seconds."""

import os
import re
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest

from harness.mpirun import descendants, end_job, run_ranks, start

HEADER = """
import os, signal, sys, threading, time
import numpy as np
import collective
from collective import Sum
collective.init()
rank, size = collective.rank(), collective.size()
x = np.full(3, rank + 1)
"""


def run(size: int, code: str, seconds: float = 40, **env: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a script on ranks."""
    done = run_ranks(size, ["-c", HEADER + textwrap.dedent(code)], seconds, env=env)
    return done.returncode, done.stdout, done.stderr


def test_ends_well_without_shutdown_or_wait() -> None:
    """Operations in flight, agreed and not; handles dropped and kept; a thread that still waits."""
    status, stdout, stderr = run(
        3,
        """
for n in range(100):
    collective.allreduce_async(np.ones(100_000), name=f"dropped.{n}")
kept = collective.broadcast_async(np.ones(5_000_000), name="kept")
if rank == 1:
    lonely = collective.allreduce_async(np.ones(3), name="nobody else's")
def waits():
    try:
        collective.allreduce(np.ones(3), name="not everybody's")
    except collective.ShutdownError:
        pass
if rank == 2:
    threading.Thread(target=waits, daemon=True).start()
print("end", rank)
""",
    )
    assert status == 0, stderr
    assert sorted(stdout.split("\n")) == ["", "end 0", "end 1", "end 2"]
    assert not [line for line in stderr.splitlines() if "cores of a node" not in line]


def test_uncaught_exception_ends_the_job() -> None:
    """While one rank waits for it in an operation, and another is busy with something else."""
    begin = time.monotonic()
    status, _, stderr = run(
        3,
        """
def faulty():
    raise ValueError("of this rank")
if rank == 1:
    collective.barrier(name="start")
    pending = collective.allreduce_async(x, name="pending")
    faulty()
collective.barrier(name="start")
collective.allreduce(x, name="waits") if rank == 0 else time.sleep(100)
""",
    )
    assert status != 0
    assert time.monotonic() - begin < 20
    assert re.search(r"Traceback.*\n.*in <module>\n.*in faulty\nValueError: of this rank\n", stderr, re.DOTALL)
    assert "rank 1: uncaught ValueError" in stderr
    assert stderr.count("Traceback") == 1


def test_a_traceback_that_another_hook_holds_back_is_shown() -> None:
    """As torch.distributed's does, which prints with the number of its rank what the hook before it has printed."""
    status, _, stderr = run(
        2,
        """
import io
ours = sys.excepthook
def holds_back(*what):
    shown, sys.stderr = sys.stderr, io.StringIO()
    ours(*what)
sys.excepthook = holds_back
if rank == 1:
    raise ValueError("of this rank")
collective.barrier()
""",
    )
    assert status != 0
    assert "ValueError: of this rank" in stderr
    assert "rank 1: uncaught ValueError" in stderr


def test_one_rank_exits_while_others_wait() -> None:
    """They learn which; a status that is not 0 becomes the job's."""
    code = """
if rank == 1:
    time.sleep(0.3)
    sys.exit(3)
try:
    collective.allreduce(x, name="waits")
except collective.ShutdownError as error:
    print(rank, error)
try:
    collective.broadcast(x, name="later")
except collective.ShutdownError as error:
    print(rank, error)
"""
    status, stdout, stderr = run(3, code)
    assert status == 3, stderr
    for rank in (0, 2):
        assert re.search(rf"^{rank} allreduce 'waits': rank 1 has shut down", stdout, re.MULTILINE), stdout
        later = rf"^{rank} broadcast 'later': ranks? .*\b1\b.* had already shut down"
        assert re.search(later, stdout, re.MULTILINE), stdout
    assert "Traceback" not in stderr


@pytest.mark.parametrize(("leaver", "how"), [(0, "pass"), (2, "pass"), (1, "sys.exit(3)"), (0, "raise SystemExit(4)")])
def test_one_rank_ends_early(leaver: int, how: str) -> None:
    """Uncaught on the others, this ends the job, with a line of each of them, and with the first one's status."""
    code = f"if rank == {leaver}: {how}\nelse: collective.allgather(x, name='one more')"
    status, _, stderr = run(3, code)
    assert status == int(re.sub(r"\D", "", how) or 1)
    for rank in {0, 1, 2} - {leaver}:
        why = rf"ShutdownError: allgather 'one more': ranks? [\d, ]*\b{leaver}\b.* shut down"
        assert re.search(rf"^\[collective\] rank {rank} ends: <string>:\d+: {why}", stderr, re.MULTILINE), stderr
    assert "Traceback" not in stderr


def test_one_rank_ends_early_and_another_does_not_come_to_its_end() -> None:
    """The job ends all the same, as soon as somebody knows."""
    begin = time.monotonic()
    status, _, stderr = run(3, "if rank == 2: time.sleep(100)\nif rank == 0: collective.allreduce(x, name='one more')")
    assert status != 0
    assert time.monotonic() - begin < 30
    assert "rank 0 ends: <string>" in stderr


def test_interrupted_rank_ends_the_job() -> None:
    """SIGINT, as from a debugger: heard also while the rank waits in an operation."""
    begin = time.monotonic()
    status, _, stderr = run(
        2,
        """
if rank == 1:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    collective.allreduce(x, name="waits")
time.sleep(100)
""",
    )
    assert status != 0
    assert "KeyboardInterrupt" in stderr
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGKILL of a rank"])
def test_signals_end_the_job(how: str) -> None:
    """And leave no process behind."""
    process = start(
        2,
        ["-c", HEADER + "print(os.getpid(), flush=True)\nrank and collective.allreduce(x)\ntime.sleep(100)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        ranks = [int(process.stdout.readline()) for _ in range(2)]
        below = descendants(process.pid)
        assert set(ranks) <= set(below)
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            os.kill(ranks[1], signal.SIGKILL)
        process.communicate(timeout=20)
    finally:
        if process.poll() is None:
            end_job(process)
    assert process.returncode != 0
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in below):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.05)


def test_an_engine_that_stops_tells_the_others() -> None:
    """At once, and why: the first cause, with the operation, the bytes that were asked for, and the rank."""
    status, stdout, stderr = run(
        3,
        """
import resource
x = np.ones(4 << 20)
collective.barrier()
if rank == 1:
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (50 << 20),) * 2)
for name in ("big", "later"):
    try:
        collective.allgather(x, name=name)
    except collective.InternalError as error:
        print(rank, name, error, flush=True)
""",
        COLLECTIVE_TIMEOUT="300",
    )
    assert status == 0, stderr
    cause = "allgather 'big': out of memory: 100663296 bytes were requested"
    for rank in range(3):
        first = cause if rank == 1 else f"the engine of rank 1 has stopped: {cause}"
        assert f"{rank} big {first}\n" in stdout, stdout + stderr
        assert f"{rank} later the engine has stopped: {first}\n" in stdout, stdout + stderr


def test_the_death_of_a_process_is_noticed(tmp_path: Path) -> None:
    """By the ranks themselves, where nobody ends the job: here they do not heed the launcher's SIGTERM."""
    run(
        3,
        f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
collective.barrier()
if rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    collective.allreduce(x, name="waits")
except collective.InternalError as error:
    open(f"{tmp_path}/{{rank}}", "w").write(str(error))
os._exit(1)
""",
        COLLECTIVE_TIMEOUT="300",
    )
    for rank in range(2):
        assert re.search(r"rank 2 \(process \d+\) has died$", (tmp_path / str(rank)).read_text())


def test_ranks_that_have_ended_wait_for_one_that_still_works() -> None:
    """With a word, and without an end: it may be writing the model."""
    work = "time.sleep(4 * (rank == 1)); print('done', rank)"
    status, stdout, stderr = run(3, work, COLLECTIVE_TIMEOUT="2", COLLECTIVE_STALL_WARNING="0.5")
    assert status == 0, stderr
    assert "done 1" in stdout
    assert "rank 0: stalled: shutdown waits for rank 1 to end or call it since" in stderr, stderr
    assert "shutdown: rank 1 did not end or call shutdown() within 2.0 s. MPI_Finalize waits" in stderr, stderr
