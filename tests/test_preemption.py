"""Jobs that are told to stop: all ranks after the same step, whoever hears the signal, and with a checkpoint."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import collective
from collective import _core
from harness.mpirun import descendants, end_job, environment, run_ranks, start
from harness.plugin import World
from test_examples import flatten, needs, same

EXAMPLES = Path(__file__).parents[1] / "examples"
forwarding = pytest.mark.skipif(
    not _core.running_mpi().startswith("Open MPI v5"), reason="what mpirun does with signals is Open MPI 5's"
)

# Ranks take steps of different length. Each writes down after which one it stopped, as mpirun may be gone.
STEPS = """
import os, signal, sys, time
import collective
guard = collective.Preemption(every=int(sys.argv[2]))
collective.init()
rank = collective.rank()
print(rank, os.getpid(), flush=True)
stopped = 0
for step in range(1, int(sys.argv[3]) + 1):
    time.sleep(0.002 * (1 + rank))
    if guard.requested():
        stopped = step
        assert guard.requested()  # from then on
        break
open(f"{sys.argv[1]}/{rank}", "w").write(f"{stopped} {guard.agreed_signal}")
guard.close()
assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
"""


class Job:
    """mpirun, and its ranks by number."""

    def __init__(self, size: int, directory: Path, every: int, steps: int) -> None:
        pipe = subprocess.PIPE
        arguments = ["-c", STEPS, str(directory), str(every), str(steps)]
        self.directory, self.size = directory, size
        self.process = start(size, arguments, stdout=pipe, stderr=pipe)
        self.ranks: dict[int, int] = {}

    def wait_for_ranks(self) -> None:
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline().split() for _ in range(self.size)]
        self.ranks = {int(rank): int(pid) for rank, pid in lines}

    def end(self) -> tuple[int, str]:
        """The exit status, and what was printed on stderr."""
        try:
            _, stderr = self.process.communicate(timeout=30)
        finally:
            if self.process.poll() is None:
                end_job(self.process)
        return self.process.returncode, stderr

    def stopped(self) -> list[tuple[int, str]]:
        """After which step, and by which signal, for each rank that has said so."""
        texts = [file.read_text().split() for file in sorted(self.directory.iterdir())]
        return [(int(step), name) for step, name in texts]


WAYS: dict[str, Callable[[Job], None]] = {
    "SIGUSR1 to one rank": lambda job: os.kill(job.ranks[1], signal.SIGUSR1),
    "SIGTERM to one rank": lambda job: os.kill(job.ranks[2], signal.SIGTERM),
    "two to different ranks": lambda job: [os.kill(job.ranks[n], signal.SIGUSR1) for n in (0, 2)] and None,
    "the same twice": lambda job: [os.kill(job.ranks[0], signal.SIGTERM) for _ in range(2)] and None,
    "SIGUSR1 to mpirun, twice": lambda job: [job.process.send_signal(signal.SIGUSR1) for _ in range(2)] and None,
}


@pytest.mark.parametrize(
    ("way", "every"),
    [pytest.param(way, 1, marks=forwarding if "mpirun" in way else ()) for way in WAYS]
    + [("SIGUSR1 to one rank", 7), ("two to different ranks", 20)],
)
def test_all_ranks_stop_after_the_same_step(tmp_path: Path, way: str, every: int) -> None:
    job = Job(3, tmp_path, every, 5000)
    try:
        job.wait_for_ranks()
        time.sleep(0.05 * every)  # some steps
        WAYS[way](job)
    finally:
        status, stderr = job.end()
    assert status == 0, stderr
    stopped = job.stopped()
    assert len(stopped) == 3
    assert len(set(stopped)) == 1, stopped
    step, name = stopped[0]
    assert 0 < step < 5000
    assert step % every == 0
    assert name == str(signal.SIGTERM if "SIGTERM" in way or "same" in way else signal.SIGUSR1)
    assert stderr.count("asks the job to stop") == 1, stderr


def test_without_a_signal_all_steps_are_made(tmp_path: Path) -> None:
    job = Job(2, tmp_path, 1, 100)
    status, stderr = job.end()
    assert status == 0, stderr
    assert job.stopped() == [(0, "None")] * 2


@forwarding
def test_sigterm_to_mpirun_ends_the_job(tmp_path: Path) -> None:
    """Within a second: whoever gets to stop in that time does so after the same step, and no process is left."""
    job = Job(2, tmp_path, 1, 5000)
    try:
        job.wait_for_ranks()
        below = descendants(job.process.pid)
        begin = time.monotonic()
        job.process.send_signal(signal.SIGTERM)
    finally:
        status, _ = job.end()
    assert status != 0
    assert time.monotonic() - begin < 10
    assert len(set(job.stopped())) <= 1
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in below):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.05)


@pytest.mark.ranks(2, 3)
def test_calls_are_counted_alike_after_a_join(world: World) -> None:
    with collective.Preemption([signal.SIGUSR2], every=3) as guard:
        for _ in range(2 + 3 * world.rank):
            assert not guard.requested()
        collective.join()
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        assert [guard.requested() for _ in range(5)] == [False, False, True, True, True]
        assert guard.agreed_signal is signal.SIGUSR2


@pytest.mark.ranks(3)
def test_a_process_set_agrees_among_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    some = collective.add_process_set([1, 2])
    with collective.Preemption([signal.SIGUSR2], process_set=some) as guard:
        if world.rank != 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        if some.included():
            assert guard.requested()
            assert not guard.requeue()
        collective.barrier()
    collective.remove_process_set(some)


def python(code: str) -> str:
    """What one process prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_handlers_are_restored() -> None:
    own = lambda number, frame: None  # noqa: E731 - compared by identity
    before = signal.signal(signal.SIGUSR2, own)
    try:
        with collective.Preemption([signal.SIGUSR2]) as guard:
            assert signal.getsignal(signal.SIGUSR2) is not own
            assert guard.agreed_signal is None
        assert signal.getsignal(signal.SIGUSR2) is own
        guard.close()  # again
        with pytest.raises(collective.InvalidArgumentError, match="cannot hear signal"):
            collective.Preemption([signal.SIGUSR2, signal.SIGKILL])
        assert signal.getsignal(signal.SIGUSR2) is own
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_wrong_arguments_are_refused() -> None:
    for every in (0, -1, 1.5):
        with pytest.raises(collective.InvalidArgumentError, match="every="):
            collective.Preemption(every=every)  # type: ignore[arg-type]
    caught: list[BaseException] = []

    def make() -> None:
        try:
            collective.Preemption()
        except collective.InvalidArgumentError as error:
            caught.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])
    with collective.Preemption() as guard, pytest.raises(collective.NotInitializedError):
        guard.requested()


def test_forked_workers_end_as_before() -> None:
    """Pool.terminate() sends SIGTERM; a signal to the whole job reaches workers too, which must go on."""
    said = python(
        """
        import multiprocessing, os, signal, time
        import collective
        def work(n):
            os.kill(os.getpid(), signal.SIGUSR1)
            return n + 1
        guard = collective.Preemption()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            print(pool.map(work, range(4)))
            slow = pool.map_async(time.sleep, [100, 100])
            begin = time.monotonic()
        print(time.monotonic() - begin < 20)
        collective.init()
        print(guard.requested())
        os.kill(os.getpid(), signal.SIGTERM)
        print(guard.requested(), guard.agreed_signal.name)
        """
    )
    assert said == "[1, 2, 3, 4]\nTrue\nFalse\nTrue SIGTERM\n"


REQUEUE = """
import os, sys
from pathlib import Path
import collective
collective.init()
path, directory = os.environ["PATH"], Path(sys.argv[1])
for case in ("outside", "works", "fails", "missing"):
    guard = collective.Preemption()
    os.environ.pop("SLURM_JOB_ID", None)
    if case != "outside":
        os.environ["SLURM_JOB_ID"] = "4711"
    os.environ["PATH"] = f"{directory / case}:{path}" if case != "missing" else str(directory)
    done = guard.requeue()
    print(f"{case} {done}\\n", end="")
    guard.close()
"""


def program(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def test_requeue_asks_slurm_once(tmp_path: Path) -> None:
    program(tmp_path / "works" / "scontrol", f'echo "$@" >> {tmp_path}/asked')
    program(tmp_path / "fails" / "scontrol", "echo Requests are currently disabled >&2; exit 3")
    done = run_ranks(2, ["-c", REQUEUE, tmp_path], 60)
    assert done.returncode == 0, done.stderr
    answers = ["outside False", "works True", "fails False", "missing False"]
    assert sorted(done.stdout.splitlines()) == sorted(answers * 2)
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    for text in (
        "not requeued: this is no Slurm job",
        "Slurm job 4711 is requeued",
        "Slurm job 4711 is not requeued: scontrol ended with status 3: Requests are currently disabled",
        "Slurm job 4711 is not requeued: [Errno 2] No such file or directory: 'scontrol'",
    ):
        assert done.stderr.count(text) == 1, done.stderr


# ---- the examples ----

TRAIN = [str(EXAMPLES / "train_gpt.py"), "--checkpoint"]


@needs("torch")
def test_a_stopped_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Stopped by a signal to one rank, at whatever step that is."""
    import torch

    stopped, whole = tmp_path / "stopped.pt", tmp_path / "whole.pt"
    pipe = subprocess.PIPE
    process = start(2, [*TRAIN, str(stopped), "--steps", "100000"], stdout=pipe, stderr=pipe)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("step 1 ")
        ranks = [pid for pid in descendants(process.pid) if b"train_gpt.py" in cmdline(pid)]
        os.kill(ranks[-1], signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            end_job(process)
    assert process.returncode == 0, stderr
    assert "requeued" not in stderr  # nobody wants the job to go on
    steps = torch.load(stopped)["steps"]
    assert re.match(rf"step {steps} ", stdout.splitlines()[-1]), stdout
    assert 1 < steps < 100000
    assert [file.name for file in tmp_path.iterdir()] == ["stopped.pt"]
    for path, more in ((stopped, ["--resume"]), (whole, [])):
        done = run_ranks(2, [*TRAIN, path, "--steps", str(steps + 2), *more], 100)
        assert done.returncode == 0, done.stderr
    assert same(flatten(torch.load(stopped)), flatten(torch.load(whole)))


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


SCRIPTS = sorted((EXAMPLES / "slurm").iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_batch_scripts_are_well_formed(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=10)
    lines = script.read_text().splitlines()
    # sbatch reads options up to the first command only.
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(n < first for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert {"set -euo pipefail"} <= set(lines)


class Slurm:
    """Runs batch scripts as sbatch would; its srun writes down its command. tests/test_slurm.py has the real one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        program(
            directory / "bin" / "srun",
            f'[ "$1 $2" = "-K --mpi=pmix" ] || exit 9\nshift 2\necho "$@" >> {directory}/srun',
        )

    def sbatch(self, script: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        env = {**environment(), "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "4711", **variables}
        env["PATH"] = os.pathsep.join([str(self.directory / "bin"), str(Path(sys.executable).parent), env["PATH"]])
        command = ["bash", EXAMPLES / "slurm" / script, *arguments]
        return subprocess.run(
            command, env=env, cwd=self.directory, capture_output=True, text=True, timeout=60, check=False
        )

    def started(self) -> str:
        return (self.directory / "srun").read_text().splitlines()[-1]


def test_batch_scripts_start_what_they_say(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path)
    for script, arguments, variables, started in (
        ("cpu.sbatch", "", {}, "examples/train_digits.py"),
        ("cpu.sbatch", "examples/numpy_mean.py 3", {}, "examples/numpy_mean.py 3"),
        ("gpu.sbatch", "", {}, "examples/train_gpt.py --device cuda"),
        ("gpu.sbatch", "x.py --lr 1", {}, "x.py --lr 1"),
        (
            "array.sbatch",
            "--epochs 1",
            {"SLURM_ARRAY_TASK_ID": "2"},
            "examples/train_digits.py --compression bf16 --epochs 1",
        ),
        ("requeue.sbatch", "", {}, "examples/train_gpt.py --checkpoint train_gpt-4711.pt"),
    ):
        done = slurm.sbatch(script, *arguments.split(), **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        assert slurm.started() == f"python {started}"
    (tmp_path / "train_gpt-4711.pt").touch()
    slurm.sbatch("requeue.sbatch", "--steps", "9")
    assert slurm.started().endswith(" --checkpoint train_gpt-4711.pt --steps 9 --resume")
