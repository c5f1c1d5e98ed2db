"""The timeline: a trace of rank 0's operations, on demand."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import collective
from collective.timeline import start_timeline, stop_timeline
from harness.mpirun import end_job, run_ranks, start
from harness.plugin import World


def spans(path: Path) -> dict[str, list[str]]:
    """The phases of each name, in the file's order."""
    events: list[dict[str, Any]] = json.loads(path.read_text())
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["ts"] >= 0
            found[names[event["pid"]]].append(event["name"])
    return found


@pytest.mark.ranks(2)
def test_timeline(world: World, tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    for _ in range(2):  # the second one takes the first one's place
        start_timeline(path)
        with pytest.raises(collective.InvalidArgumentError, match="already"):
            start_timeline(path)
        assert path.exists() == (world.rank == 0)
        for turn in range(3):
            collective.allreduce(np.ones(100), name="weights")
            collective.broadcast(np.ones(100), turn % 2, name='the "other"')
        stop_timeline()
        stop_timeline()
        collective.allreduce(np.ones(100), name="after it")
        assert path.exists() == (world.rank == 0)
        if world.rank == 0:
            assert spans(path) == {
                name: [f"NEGOTIATE_{operation}", operation, f"MPI_{operation}"] * 3
                for name, operation in (("weights", "ALLREDUCE"), ('the "other"', "BROADCAST"))
            }


@pytest.mark.ranks(2)
def test_what_cannot_be_written_is_told_at_the_start(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's link is left alone. From init() the error is that of all ranks, and the next init() works."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / "link").symlink_to(precious)
    os.mkfifo(tmp_path / "pipe")
    wrong = [tmp_path / "no folder" / "file", tmp_path, tmp_path / "link", tmp_path / "pipe"]
    if world.rank == 0:
        for path in wrong:
            with pytest.raises(collective.InvalidArgumentError, match=rf"rank 0 cannot write a timeline to {path}: "):
                start_timeline(path)
        start_timeline(tmp_path / "good")
        stop_timeline()
    # Rank 0's paths; the other rank's own one could be written.
    monkeypatch.setenv("COLLECTIVE_TIMELINE", str(wrong[2] if world.rank == 0 else tmp_path / "unused"))
    collective.shutdown()
    with pytest.raises(collective.InvalidArgumentError, match="rank 0 cannot write a timeline"):
        collective.init()
    assert not collective.is_initialized()
    monkeypatch.setenv("COLLECTIVE_TIMELINE", str(tmp_path / "good"))
    collective.init()
    with pytest.raises(collective.InvalidArgumentError, match="already"):
        start_timeline(tmp_path / "another")
    assert collective.allreduce(1, collective.Sum, name="x") == 2
    collective.shutdown()
    monkeypatch.delenv("COLLECTIVE_TIMELINE")
    collective.init()
    if world.rank == 0:
        assert list(spans(tmp_path / "good")) == ["x"]
    assert precious.read_text() == "kept"


def test_a_full_disk_ends_the_timeline_and_not_the_job(tmp_path: Path) -> None:
    """Seen by a limit on the size of files."""
    done = run_ranks(
        1,
        [
            "-c",
            """
import resource, signal, sys
import numpy as np
import collective
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
collective.init()
for n in range(20):
    collective.allreduce(np.ones(3), name=f"x{n}")
collective.shutdown()
collective.init()
""",
        ],
        60,
        env={"COLLECTIVE_TIMELINE": str(tmp_path / "timeline.json")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the timeline ends: ") == 1, done.stderr


def test_it_holds_what_happened_before_the_job_was_killed(tmp_path: Path) -> None:
    """And can be read at any time, by what reads JSON."""
    path = tmp_path / "timeline.json"
    code = """
import os, time
import numpy as np
import collective
collective.init()
n = 0
while True:
    collective.allreduce(np.ones(3), name=f"x{n}")
    print(os.getpid(), flush=True) if n == 2 else time.sleep(0.01)
    n += 1
"""
    process = start(2, ["-c", code], env={"COLLECTIVE_TIMELINE": str(path)}, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        ranks = [int(process.stdout.readline()) for _ in range(2)]
        assert path.exists()
        deadline = time.monotonic() + 20
        while "x2" not in path.read_text():
            assert time.monotonic() < deadline, "nothing is written"
            time.sleep(0.1)
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        process.communicate(timeout=20)
    finally:
        if process.poll() is None:
            end_job(process)
    assert spans(path)["x2"] == ["NEGOTIATE_ALLREDUCE", "ALLREDUCE", "MPI_ALLREDUCE"]
