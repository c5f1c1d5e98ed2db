"""`collective top`, what the engine counts for it, and the same for Prometheus."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import collective
import collective.torch as hvd
from cluster import Cluster, why_not
from collective import Sum, jobs, watching
from collective.cli.main import group
from data import fill
from harness import mpirun
from harness.mpirun import end_job
from harness.plugin import World

TOP = [sys.executable, "-m", "collective.cli", "top"]
SECONDS = 60

# Makes 7 all-reduces of 1000 float32 and one step; rank 0 waits for the last rank in "late"; ends with standard input.
SCRIPT = """
import sys, time, numpy as np, collective
from pathlib import Path
collective.init()
rank, last = collective.rank(), collective.size() - 1
for n in range(7):
    collective.allreduce(np.arange(1000, dtype=np.float32) + rank, collective.Sum, name="x")
collective.mark_step()
collective.barrier()
if rank != last:
    handle = collective.allreduce_async(np.arange(3, dtype=np.int64), collective.Sum, name="late")
if rank == 0:
    import os
    print(os.getpid(), flush=True)
while not Path(sys.argv[1]).exists():
    time.sleep(0.05)
if rank == last:
    handle = collective.allreduce_async(np.arange(3, dtype=np.int64), collective.Sum, name="late")
assert handle.wait().tolist() == [0, collective.size(), 2 * collective.size()]
"""


@contextmanager
def job(size: int, tmp_path: Path, script: str = SCRIPT, **env: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A running job of `script`, by the process id of its rank 0; it ends well."""
    over = tmp_path / "over"
    process = mpirun.start(size, ["-c", script, str(over)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield pid_of(process), process
        over.touch()
        stdout, stderr = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, stdout + stderr
    finally:
        if process.poll() is None:
            end_job(process)


def pid_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    said = []
    for line in process.stdout:  # a launcher may warn first
        said.append(line)
        if line.strip().isdecimal():
            watchdog.cancel()
            return line.strip()
    watchdog.cancel()
    raise AssertionError(f"the job ended: {said}: {process.stderr and process.stderr.read()}")


def top(*arguments: str, under: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*under, *TOP, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=mpirun.environment(),
    )


def report_of(pid: str) -> dict[str, Any]:
    done = top(pid, "--once", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ---- what is counted ----


@pytest.mark.ranks(1, 2, 3)
def test_operations_and_bytes_are_counted_exactly(world: World) -> None:
    before = collective.statistics()
    for n in range(5):
        collective.allreduce(fill(100 + n, "float64", world.rank), Sum)
    handles = [collective.allreduce_async(fill(11, "int16", world.rank, n), Sum, name=f"c{n}") for n in range(4)]
    for handle in handles:
        handle.wait()
    collective.allgather(fill((2 + world.rank, 3), "int32", world.rank))
    collective.broadcast(fill(9, "uint8", world.rank), 0)
    collective.barrier()
    now = collective.statistics()

    def made(field: str) -> dict[str, int]:
        old, new = getattr(before, field), getattr(now, field)
        return {kind: new[kind] - old.get(kind, 0) for kind in new if new[kind] != old.get(kind, 0)}

    assert made("operations") == {"allreduce": 9, "allgather": 1, "broadcast": 1, "barrier": 1}
    rows = 2 + world.rank
    assert made("bytes") == {"allreduce": 8 * (5 * 100 + 10) + 4 * 22, "allgather": rows * 12, "broadcast": 9}
    collective.stragglers()
    assert "stragglers" not in collective.statistics().operations  # which is no operation of the script's
    assert now.failed == before.failed
    assert (now.in_flight, now.oldest, now.state) == (0, None, "running")
    assert 0 < now.wait_seconds <= now.seconds
    assert 0 < now.in_flight_seconds <= now.seconds


@pytest.mark.ranks(2, 3)
def test_sends_failures_and_what_is_in_flight(world: World) -> None:
    before = collective.statistics()
    with pytest.raises(collective.MismatchError):
        collective.allreduce(np.zeros(3 + world.rank), Sum, name="differs")
    assert collective.statistics().failed == before.failed + 1
    world.comm.Barrier()
    if world.rank == 0:
        handle = collective.allreduce_async(fill(5, "float32", 0), Sum, name="early")
        now = collective.statistics()
        assert now.oldest is not None
        assert (now.in_flight, now.oldest.name, now.oldest.kind) == (1, "early", "allreduce")
        assert now.oldest.seconds >= 0
    world.comm.Barrier()
    if world.rank != 0:
        handle = collective.allreduce_async(fill(5, "float32", world.rank), Sum, name="early")
    handle.wait()
    assert collective.statistics().in_flight == 0
    if world.rank == 0:
        collective.send(fill(6, "int64", 0), 1)
    elif world.rank == 1:
        collective.recv(np.empty(6, np.int64), 0)
    now = collective.statistics()
    kind = {0: "send", 1: "recv"}.get(world.rank)
    if kind is not None:
        assert now.operations[kind] - before.operations.get(kind, 0) == 1
        assert now.bytes[kind] - before.bytes.get(kind, 0) == 48


@pytest.mark.ranks(2)
def test_an_optimizer_counts_its_steps_and_gradients(world: World) -> None:
    torch = pytest.importorskip("torch")
    p = torch.nn.Parameter(torch.zeros(1000))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), op=hvd.Sum)
    before = hvd.statistics()
    for step in range(3):
        p.grad = torch.full((1000,), float(world.rank + step))
        optimizer.step()
        optimizer.zero_grad()
    now = hvd.statistics()
    assert p.unique().tolist() == [-9.0]
    assert now.steps - before.steps == 3
    assert now.operations["bucket"] - before.operations.get("bucket", 0) == 3
    assert now.bytes["bucket"] - before.bytes.get("bucket", 0) == 3 * 4000


def test_before_init_there_is_nothing_to_tell() -> None:
    with pytest.raises(collective.NotInitializedError):
        collective.statistics()


# ---- the command ----


@pytest.mark.parametrize("size", [2, 3])
def test_a_running_job(size: int, tmp_path: Path) -> None:
    with job(size, tmp_path) as (pid, _):
        report = report_of(pid)
        tables = top(pid, "--once", "--limit", "1")
        live = subprocess.Popen([*TOP, pid, "--interval", "0.1"], stdout=subprocess.PIPE, text=True)
        assert live.stdout is not None
        headlines = 0
        for line in live.stdout:  # one table after another, since it goes to no terminal
            headlines += line.startswith(pid)
            if headlines == 3:
                break
        live.send_signal(signal.SIGINT)
        live.communicate(timeout=SECONDS)
        assert live.returncode == 0
    about = report["job"]
    assert (about["pid"], about["ranks"], about["host"]) == (int(pid), size, socket.gethostname())
    assert [rank["rank"] for rank in report["ranks"]] == list(range(size))
    for number, rank in enumerate(report["ranks"]):
        found = rank["statistics"]
        assert rank["silence"] is None
        assert (found["operations"]["allreduce"], found["bytes"]["allreduce"]) == (7, 7 * 4000)
        assert (found["operations"]["barrier"], found["steps"], found["state"]) == (1, 1, "running")
        if number == size - 1:
            assert (found["in_flight"], found["oldest"]) == (0, None)
        else:
            assert (found["in_flight"], found["oldest"]["name"], found["oldest"]["kind"]) == (1, "late", "allreduce")
    assert tables.returncode == 0, tables.stderr
    assert f"{pid} (-c); {size} ranks; for " in tables.stdout
    assert "steps/s" in tables.stdout
    assert f"and {size - 1} more ranks" in tables.stdout
    assert len([line for line in tables.stdout.splitlines() if socket.gethostname() in line]) == 1
    ended = top(pid)
    assert ended.returncode == 2
    assert f"no job {pid} runs on this host." in ended.stderr


def test_a_rank_that_is_stopped_is_said_to_be_silent(tmp_path: Path) -> None:
    with job(2, tmp_path) as (pid, _):
        other = report_of(pid)["ranks"][1]["pid"]
        os.kill(other, signal.SIGSTOP)
        try:
            report, tables = report_of(pid), top(pid, "--once")
        finally:
            os.kill(other, signal.SIGCONT)
        assert report["ranks"][0]["statistics"]["operations"]["allreduce"] == 7
        assert report["ranks"][1]["statistics"] is None
        assert report["ranks"][1]["silence"] == "its process does not answer"
        first = tables.stdout.splitlines()[2]
        assert str(other) in first and "its process does not answer" in first  # noqa: PT018
        assert "1 of them silent" in tables.stdout
        assert report_of(pid)["ranks"][1]["statistics"]["operations"]["allreduce"] == 7


# Rank 1 comes 30 ms late to each operation, until a file exists; 30 of them at least.
LATE = """
import sys, time, numpy as np, collective
from pathlib import Path
collective.init()
if collective.rank() == 0:
    import os
    print(os.getpid(), flush=True)
steps, over = 0, False
while not over or steps < 30:
    if collective.rank() == 1:
        time.sleep(0.03)
    flag = np.array([collective.rank() == 0 and Path(sys.argv[1]).exists()], dtype=np.int32)
    over = bool(collective.allreduce(flag, collective.Sum, name="flag")[0])
    steps += 1
"""


def test_the_rank_that_the_others_wait_for(tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    port = free_port()
    with job(3, tmp_path, LATE, COLLECTIVE_METRICS=str(port)) as (pid, _):
        for _ in range(5 * SECONDS):
            late = [rank["late_seconds"] for rank in report_of(pid)["ranks"]]
            if late[1] is not None and late[1] > 30 * 0.01:
                break
            time.sleep(0.2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SECONDS) as answer:
            text = answer.read().decode()
        table = top(pid, "--once").stdout.splitlines()
    assert late[1] > 30 * 0.01, late
    assert late[1] == max(late)
    assert None not in late
    told = {
        sample.labels["rank"]: sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "collective_late_seconds_total"
    }
    assert set(told) == {"0", "1", "2"}
    assert told["1"] == max(told.values()) >= late[1]
    assert table[1].split()[:5] == ["rank", "host", "pid", "waits", "late"]
    assert table[2].split()[0] == "1"


def test_what_goes_wrong_once_does_not_close_the_door(
    base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither too many open files, nor an answer that fails."""
    monkeypatch.setattr(watching, "_PAUSE_S", 0.01)
    answers: Iterator[Any] = iter([ValueError("first"), ValueError("second"), {"ranks": 3}])

    def report() -> dict[str, Any]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    class Listener:
        """Has no descriptor left, once."""

        def __init__(self, listener: socket.socket) -> None:
            self._errors = [OSError(errno.EMFILE, os.strerror(errno.EMFILE))]
            self._listener = listener

        def accept(self) -> tuple[socket.socket, Any]:
            if self._errors:
                raise self._errors.pop()
            return self._listener.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._listener, name)

    door = watching._Door("11", {"report": report})
    try:
        (entry,) = jobs.entries()
        door._listener = Listener(door._listener)  # type: ignore[assignment]
        for _ in range(2):
            with pytest.raises(ConnectionResetError):
                entry.ask("report")
        assert entry.ask("report") == {"ranks": 3}
    finally:
        door.close()
    assert capfd.readouterr().err.count("`collective top` was not answered: ValueError: first") == 1
    assert not entry.path.exists()


def test_a_job_that_was_killed(tmp_path: Path) -> None:
    """Its socket stays behind until somebody looks."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "over")],
        env=mpirun.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        pid = pid_of(process)
    finally:
        process.kill()
        process.communicate()
    (entry,) = [entry for entry in jobs.entries() if entry.is_called(pid)]
    assert entry.path.is_socket()
    done = top(pid, "--once")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"collective top: job {pid} has ended." in done.stderr
    assert not entry.path.exists()


def test_a_job_that_listens_to_nobody(tmp_path: Path) -> None:
    with job(2, tmp_path, COLLECTIVE_OUT_OF_BAND="0") as (pid, _):
        done = top(pid, "--once")
    assert done.returncode == 2
    assert "no job" in done.stderr
    assert "COLLECTIVE_OUT_OF_BAND" in done.stderr


def test_a_forked_child_holds_none_of_the_sockets(tmp_path: Path) -> None:
    code = f"""
import os, socket, collective
from collective import jobs, runtime
collective.init()
channel = runtime.current().channel
ours = {{channel.processes[collective.rank()].port, {os.environ.get("COLLECTIVE_METRICS", 0)}}}
def held():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            one = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with one:
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.append(one.getsockname())
    return [at for at in found if isinstance(at, str) or at[1] in ours]
before = held()
assert len(before) == (2 if collective.rank() == 0 else 1), before
child = os.fork()
if child == 0:
    os._exit(len(held()))
assert os.waitpid(child, 0)[1] == 0
assert len(held()) == len(before)
answers = channel.ask(range(2), "statistics")
assert [answers[rank]["operations"] for rank in range(2)] == [{{}}, {{}}], answers
collective.barrier()
"""
    done = mpirun.run_ranks(2, ["-c", code], SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- which job ----


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sockets are, without those of other jobs on this machine."""
    monkeypatch.setattr(jobs, "_BASE", tmp_path)
    return tmp_path


def told(*arguments: str) -> Result:
    return CliRunner().invoke(group, ["top", *arguments], terminal_width=1000)


@contextmanager
def pretended(name: str, program: str) -> Iterator[None]:
    """A job that answers what it is."""
    listener, path = jobs.listen(name)

    def answer() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                if connection.recv(100):
                    connection.sendall(json.dumps({"program": program, "ranks": 2}).encode())

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
        assert path.exists()


def test_no_job_at_all(base: Path) -> None:
    done = told("--once")
    assert done.exit_code == 2
    assert done.stderr.startswith("collective top: no job of yours runs on this host.")


def test_several_jobs_are_listed(base: Path) -> None:
    with pretended("11", "first.py"), pretended("700.12", "second\x1b[2J.py"):
        done = told("--once")
        assert done.exit_code == 2
        assert "several jobs of yours run here; name one: 11 (first.py, 2 ranks); 700.12 (second?[2J.py, 2 ranks)." in (
            done.stderr
        )
        for name in ("700", "12", "700.12"):
            assert json.loads(told(name, "--once", "--json").stdout)["program"] == "second\x1b[2J.py"
    assert told("11").stderr == "collective top: job 11 has ended.\n"
    assert jobs.entries() == [jobs.Entry(jobs.directory() / "700.12")]


def test_a_directory_that_others_can_write_to(base: Path) -> None:
    jobs.directory().mkdir(mode=0o755)
    done = told()
    assert done.exit_code == 2
    assert "is not a directory that belongs to this user alone, with mode 0700" in done.stderr
    with pytest.raises(PermissionError):
        jobs.listen("1")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="becomes another user by setpriv")
def test_jobs_of_others(tmp_path: Path) -> None:
    nobody = ("setpriv", "--reuid", "65533", "--regid", "65533", "--clear-groups")
    with job(1, tmp_path) as (pid, _):
        done = top(pid, "--once", under=nobody)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"process {pid} belongs to user 0, and only that user may look at it." in done.stderr
    code = "from collective import jobs; held = jobs.listen('4711.1'); print(flush=True); input()"
    other = subprocess.Popen(
        [*nobody, sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "\n"
        done = top("4711.1", "--once")
        assert done.returncode == 2
        assert "job 4711.1 belongs to user 65533, and only that user may look at it." in done.stderr
    finally:
        other.communicate("\n", timeout=SECONDS)
        shutil.rmtree("/tmp/collective-65533")


# ---- the table ----


def made_up(at: float, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """A report at this time of a job that started at 100; of each rank: what differs from a rank without a past."""
    blank = {"operations": {}, "bytes": {}, "wait_seconds": 0.0, "steps": 0, "in_flight": 0, "oldest": None}
    return {
        "at": at,
        "job": {"pid": 7, "slurm_job": "123", "program": "train.py", "ranks": len(ranks), "started": 100.0},
        "ranks": [
            {
                "rank": number,
                "host": f"host{number}",
                "pid": 70 + number,
                "silence": rank.get("silence"),
                "late_seconds": rank.get("late_seconds"),
                "statistics": None
                if "silence" in rank
                else {**blank, "seconds": at - 100.0, "state": "running", **rank},
            }
            for number, rank in enumerate(ranks)
        ],
    }


def lines(capsys: pytest.CaptureFixture[str], limit: int, *reports: dict[str, Any]) -> list[str]:
    """The last table, with one space between words."""
    from collective.cli.top_table import screen

    with screen(True, limit) as show:
        for before, report in zip([None, *reports], reports, strict=False):
            capsys.readouterr()
            show(report, before)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_numbers_are_those_of_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    first = made_up(
        110.0, [{"steps": 5, "wait_seconds": 5.0, "operations": {"allreduce": 100}, "bytes": {"allreduce": 50e6}}]
    )
    second = made_up(
        114.0,
        [
            {
                "steps": 13,
                "wait_seconds": 6.0,
                "operations": {"allreduce": 110, "barrier": 2},
                "bytes": {"allreduce": 90e6, "barrier": 0},
                "in_flight": 3,
                "oldest": {"name": "x\n", "kind": "allreduce", "seconds": 75.0},
            }
        ],
    )
    assert lines(capsys, 9, first) == [
        "Slurm job 123, 7 (train.py); 1 ranks; for 10.0 s; 0.50 steps/s",
        "rank host pid waits MB/s ops/s in flight",
        "0 host0 70 50% 5.0 10.0 -",
    ]
    assert lines(capsys, 9, first, second) == [
        "Slurm job 123, 7 (train.py); 1 ranks; for 14.0 s; 2.00 steps/s",
        "rank host pid waits MB/s ops/s in flight",
        "0 host0 70 25% 10.0 3.0 allreduce x? for 1 min 15 s, and 2 more",
    ]


def test_the_worst_ranks_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    ranks = [
        {"wait_seconds": 9.0},
        {"wait_seconds": 1.0},
        {"silence": "its process is gone"},
        {"wait_seconds": 5.0, "late_seconds": 4.0},
        {"state": "the engine has stopped: why"},
    ]
    table = lines(capsys, 5, made_up(110.0, ranks))
    assert "; 5 ranks, 1 of them silent; " in table[0]
    assert table[1] == "rank host pid waits late MB/s ops/s in flight"
    assert table[2] == "2 host2 72 - - - - its process is gone"
    assert table[3] == "4 host4 74 0% 0% 0.0 0.0 the engine has stopped: why"
    assert table[4] == "3 host3 73 50% 40% 0.0 0.0 -"
    assert [line.split()[0] for line in table[5:]] == ["1", "0"]
    assert lines(capsys, 2, made_up(110.0, ranks))[2:] == [*table[2:4], "and 3 more ranks"]


# ---- Prometheus ----


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listeners(port: int) -> list[str]:
    """The addresses at which somebody listens at this port."""
    fields = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    bound = [local.split(":") for _, local, _, state, *_ in fields if state == "0A"]
    return [socket.inet_ntoa(bytes.fromhex(address)[::-1]) for address, at in bound if int(at, 16) == port]


def test_metrics(tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    port = free_port()
    with job(2, tmp_path, COLLECTIVE_METRICS=str(port)):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SECONDS) as answer:
            text = answer.read().decode()
        assert listeners(port) == ["127.0.0.1"]
    samples = {
        (sample.name, sample.labels["rank"], sample.labels.get("kind")): sample
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    for rank in ("0", "1"):
        assert samples["collective_rank_up", rank, None].value == 1
        assert samples["collective_operations_total", rank, "allreduce"].value == 7
        assert samples["collective_bytes_total", rank, "allreduce"].value == 28000
        assert samples["collective_steps_total", rank, None].value == 1
        assert samples["collective_failed_operations_total", rank, None].value == 0
        assert samples["collective_wait_seconds_total", rank, None].value > 0
        assert samples["collective_in_flight_operations", rank, None].value == (rank == "0")
        assert samples["collective_rank_up", rank, None].labels["host"] == socket.gethostname()
    assert samples["collective_oldest_operation_age_seconds", "0", None].value > 0


def test_metrics_at_a_port_that_is_taken() -> None:
    pytest.importorskip("prometheus_client")
    code = """
import collective
try:
    collective.init()
except collective.InvalidArgumentError as error:
    print(f"told: {error}\\n", end="")
assert not collective.is_initialized()
"""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = mpirun.run_ranks(2, ["-c", code], SECONDS, env={"COLLECTIVE_METRICS": str(port)})
    assert done.returncode == 0, done.stderr
    told = re.findall(r"told: COLLECTIVE_METRICS: rank 0 cannot serve at 127.0.0.1, port \d+: (.*)", done.stdout)
    assert told == ["Address already in use"] * 2


# ---- several nodes ----


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=f"no cluster here: {why_not()}")
def test_ranks_on_several_nodes(tmp_path: Path) -> None:
    over = tmp_path / "over"
    with Cluster([1, 2], rate=None) as cluster:
        process = cluster.start([sys.executable, "-c", SCRIPT, str(over)], stdout=subprocess.PIPE)
        report = report_of(pid_of(process))
        over.touch()
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, output
    assert [rank["host"] for rank in report["ranks"]] == ["host0", "host1", "host1"]
    for rank in report["ranks"]:
        assert rank["statistics"]["operations"]["allreduce"] == 7
        assert rank["statistics"]["bytes"]["allreduce"] == 7 * 4000
