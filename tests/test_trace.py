"""One trace of all ranks: what is in it, what it is made of, and what is left of it when ranks are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import collective
from collective import clocks, recording
from collective.steps import mark_step
from collective.timeline import start_timeline, stop_timeline
from collective.trace import merge, start_trace, stop_trace
from harness.mpirun import end_job, run_ranks, start
from harness.plugin import World
from traces import Trace


def work(turns: int) -> None:
    for turn in range(turns):
        collective.allreduce(np.ones(100 + turn, np.float32), name="weights")
        handles = [collective.allreduce_async(np.ones(10), name=f"x{n}") for n in range(3)]
        for handle in reversed(handles):
            handle.wait()
        collective.broadcast(np.ones(7), 0, name='the "other"\n')


@pytest.mark.ranks(1, 2, 3, 4)
def test_it_has_the_operations_of_all_ranks(world: World, tmp_path: Path) -> None:
    """Beside a timeline of rank 0's, one after the other and not of what comes between."""
    some = collective.add_process_set([world.size - 1])
    pairs = collective.add_process_set(range(world.size - world.size % 2)) if world.size == 3 else None
    for turns in (3, 1):
        path = Path(world.comm.bcast(str(tmp_path / "trace.json")))
        start_timeline(tmp_path / "timeline.json")
        start_trace(path)
        with pytest.raises(collective.InvalidArgumentError, match="a trace is being recorded already, to "):
            start_trace(path)
        work(turns)
        for set_ in (some, pairs):
            if set_ is not None and set_.included():
                collective.allreduce(np.ones(5), name="weights", process_set=set_)
        stop_trace()
        stop_trace()
        stop_timeline()
        work(1)
        assert [file.name for file in path.parent.glob("trace*")] == ["trace.json"]
        trace = Trace(path)
        assert trace.about["remarks"] == []
        assert trace.about["ranks"] == world.size
        assert [name.split(" on ")[0] for name in trace.processes] == [f"rank {rank}" for rank in range(world.size)]
        for rank in range(world.size):
            waits, runs = trace.names(rank, "wait"), trace.names(rank, "run")
            sets = (rank == world.size - 1) + (pairs is not None and rank < 2)
            for name, often in (("weights", turns + sets), ("x0", turns), ("x2", turns), ('the "other"\n', turns)):
                assert waits.count(name) == often, name
            assert runs.count("weights") == turns + sets
            assert runs.count('the "other"\n') == turns
            assert not trace.names(rank, "step")
        named = [event for event in trace.slices if event["name"] == "weights" and event["args"]["bytes"] != 40]
        assert {event["args"]["bytes"] for event in named} == {4 * (100 + turn) for turn in range(turns)}
        assert {event["args"].get("group") for event in trace.slices} >= {None, f"process set [{world.size - 1}]"}
        assert len(trace.arrows) >= (5 * turns if world.size > 1 else 0)
        if world.rank == 0:
            assert "MPI_ALLREDUCE" in (tmp_path / "timeline.json").read_text()
        world.comm.Barrier()  # before it is replaced


def mark_step_in_child() -> None:
    child = os.fork()
    if child == 0:
        try:
            before = recording._recording
            mark_step()
            os._exit(recording._recording is not before)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.ranks(2)
def test_steps_and_a_window_of_them(world: World, tmp_path: Path) -> None:
    path = Path(world.comm.bcast(str(tmp_path / "trace.json.gz")))
    collective.shutdown()
    collective.init()
    start_trace(path, steps=(2, 3))
    for step in range(6):
        collective.allreduce(np.ones(3), name=f"of {step}")
        if step == 3:  # which is the last one also for a child, whose business the trace is not
            mark_step_in_child()
        mark_step()
    stop_trace()
    trace = Trace(path)
    for rank in range(2):
        assert trace.names(rank, "wait") == trace.names(rank, "run") == ["of 2", "of 3"]
        assert trace.names(rank, "step") == ["step 2", "step 3"]
    steps = {event["name"]: event for event in trace.slices if event["pid"] == 1}
    assert steps["step 2"]["ts"] <= steps["of 2"]["ts"] <= steps["step 3"]["ts"] <= steps["of 3"]["ts"]
    world.comm.Barrier()


@pytest.mark.ranks(2)
def test_an_optimizer_marks_steps_and_arrows_join_its_buckets(world: World, tmp_path: Path) -> None:
    """And torch.profiler shows what it does and waits for."""
    torch = pytest.importorskip("torch")
    import collective.torch as hvd

    path = Path(world.comm.bcast(str(tmp_path / "trace.json")))
    model = torch.nn.Sequential(*[torch.nn.Linear(300, 300) for _ in range(4)])
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), groups=3)
    hvd.start_trace(path)

    def step() -> None:
        model(torch.full((2, 300), float(world.rank))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    hvd.stop_trace()
    trace = Trace(path)
    for rank in range(2):
        assert len(trace.names(rank, "step")) == 3
    buckets = [event for event in trace.slices if event["args"]["kind"] == "bucket"]
    assert len({event["name"] for event in buckets}) == 3
    assert {event["args"]["number"] for event in buckets} == {1, 2, 3}
    assert all("last_to_come" in event["args"] for event in buckets)
    ends = [(event["pid"], event["tid"], event["ts"]) for arrow in trace.arrows.values() for event in arrow]
    assert {(event["pid"], event["tid"], event["ts"]) for event in buckets} <= set(ends)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    ranges = {event.name for event in profile.events() if event.name.startswith("collective: ")}
    assert {"collective: start bucket 0", "collective: start bucket 2"} <= ranges
    assert any(name.startswith("collective: synchronize optimizer.") for name in ranges)
    assert any(name.startswith("collective: wait for optimizer.") and "bucket2" in name for name in ranges)
    world.comm.Barrier()


@pytest.mark.ranks(2)
def test_what_cannot_be_written_is_told_on_all_ranks(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0's path counts, in init() too; nothing is left behind, and the next trace works."""
    folder = Path(world.comm.bcast(str(tmp_path)))
    if world.rank == 0:
        (tmp_path / "precious").write_text("kept")
        (tmp_path / "link").symlink_to(tmp_path / "precious")
        (tmp_path / "blocked.rank1.json").mkdir()
    wrong = {"no folder/t.json": "No such file", "link": "not a regular file", "blocked.json": "Is a directory"}
    world.comm.Barrier()
    for name, why in wrong.items():
        rank = 1 if name == "blocked.json" else 0
        with pytest.raises(collective.InvalidArgumentError, match=f"rank {rank} cannot write its part of .*{why}"):
            start_trace(folder / name)
    for steps, max_mb in (((3, 2), 1), (5, 1), ((-1, 2), 1), (None, 0), (None, 1 << 20)):
        with pytest.raises(collective.InvalidArgumentError, match=r"steps=|max_mb="):
            start_trace(folder / "t.json", steps=steps, max_mb=max_mb)  # type: ignore[arg-type]
    monkeypatch.setenv("COLLECTIVE_TRACE", str(folder / "link" if world.rank == 0 else tmp_path / "unused"))
    collective.shutdown()
    with pytest.raises(collective.InvalidArgumentError, match="rank 0 cannot write its part of a trace"):
        collective.init()
    monkeypatch.setenv("COLLECTIVE_TRACE", str(folder / "t.json"))
    collective.init()
    collective.allreduce(np.ones(3), name="x")
    collective.shutdown()
    monkeypatch.delenv("COLLECTIVE_TRACE")
    collective.init()
    assert Trace(folder / "t.json").names(1, "run") == ["x"]
    left = sorted(file.name for file in folder.iterdir())
    assert left == ["blocked.rank1.json", "link", "precious", "t.json"]
    assert (folder / "precious").read_text() == "kept"


def test_what_is_too_much_is_dropped_and_counted(tmp_path: Path) -> None:
    """One warning for the job; the trace says it, too, and where."""
    code = """
import numpy as np
import collective
collective.init()
for n in range(4000):
    collective.allreduce(np.ones(3), name=f"x{n % 7}")
"""
    path = tmp_path / "t.json.gz"
    done = run_ranks(2, ["-c", code], 60, env={"COLLECTIVE_TRACE": str(path), "COLLECTIVE_TRACE_MAX_MB": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the trace was full: the last ") == 1, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["t.json.gz"]
    trace = Trace(path)
    assert len(trace.about["remarks"]) == 1
    assert trace.about["remarks"][0].endswith(" events of ranks 0, 1 were dropped")
    assert [event["pid"] for event in trace.events if event["name"].startswith("the trace is full")] == [1, 2]
    dropped = int(trace.about["remarks"][0].split()[6])
    assert len(trace.slices) + dropped == 2 * 2 * 4000
    assert len(trace.slices) > 4000  # of 150 bytes: most of a MiB


def trace_tool(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "collective.cli", "trace", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_what_killed_ranks_leave_is_merged_by_hand(tmp_path: Path) -> None:
    """Each part can be read by itself, at any time; one that ends in the middle of a line is merged, too."""
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
    parts = [tmp_path / f"t.rank{rank}.json" for rank in range(2)]
    process = start(2, ["-c", code], env={"COLLECTIVE_TRACE": str(tmp_path / "t.json")}, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        ranks = [int(process.stdout.readline()) for _ in range(2)]
        deadline = time.monotonic() + 20
        while not all(part.exists() and '"x2"' in part.read_text() for part in parts):
            assert time.monotonic() < deadline, "nothing is written"
            time.sleep(0.1)
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        process.communicate(timeout=20)
    finally:
        if process.poll() is None:
            end_job(process)
    assert sorted(tmp_path.iterdir()) == parts
    for part in parts:
        assert {"x0", "x1", "x2"} <= {event["name"] for event in json.loads(part.read_text())}
    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole[: whole.index(b'"x2"') + 10])
    done = trace_tool("merge", *parts, "-o", tmp_path / "t.json")
    assert done.returncode == 0, done.stderr
    assert "the end of ranks 0, 1 is missing, as of processes that were killed" in done.stderr
    trace = Trace(tmp_path / "t.json")
    assert {"x0", "x1", "x2"} <= set(trace.names(0, "run"))
    assert "x1" in trace.names(1, "run")
    assert "x2" not in trace.names(1, "run")
    assert trace.arrows


def part(
    rank: int, slices: Sequence[tuple[float, float]], readings: Sequence[tuple[float, float]], **header: Any
) -> bytes:
    """As a rank would have written it."""
    about = {"job": "a", "rank": rank, "ranks": 2, "host": f"h{rank}", "clock": 5.0, "seconds_since_1970": 1e9}
    events: list[dict[str, Any]] = [{"name": "collective_trace", "ph": "M", "args": about | header}]
    events += [
        {"name": "collective_clock", "ph": "M", "args": {"at": at, "ahead": ahead, "delay": 4.0}}
        for at, ahead in readings
    ]
    for number, (begin, duration) in enumerate(slices):
        what = {"kind": "bucket", "number": number, "bytes": 8}
        event = {"name": "b", "cat": "run", "ph": "X", "pid": rank + 1, "tid": 3000, "ts": begin, "dur": duration}
        events.append({**event, "args": what})
    events.append({"name": "collective_end", "ph": "M", "args": {"dropped": 0}})
    return b"[\n" + b",\n".join(json.dumps(event).encode() for event in events) + b"\n]\n"


def test_clocks_are_aligned_and_their_drift_is_corrected(tmp_path: Path) -> None:
    """Rank 1's clock is 1000 us ahead at first, and gains 10 us in 1000."""
    true = [(100.0, 50.0), (600.0, 50.0), (1100.0, 50.0)]
    wrong = [((begin) * 1.01 + 1000, duration * 1.01) for begin, duration in true]
    late = [(begin + 20, duration) for begin, duration in true]
    readings = [(0 * 1.01 + 1000, 1000.0), (2000 * 1.01 + 1000, 1020.0)]
    parts = [("0", part(0, late, [(0.0, 0.0), (2000.0, 0.0)])), ("1", part(1, wrong, readings))]
    assert merge.merge(parts, tmp_path / "t.json") == []
    trace = Trace(tmp_path / "t.json")
    assert trace.about["clocks_agree_to_us"] == 2.0
    at = {pid: [(e["ts"], e["dur"]) for e in trace.slices if e["pid"] == pid] for pid in (1, 2)}
    assert at[1] == [(20.0, 50.0), (520.0, 50.0), (1020.0, 50.0)]
    assert at[2] == [(0.0, 50.0), (500.0, 50.0), (1000.0, 50.0)]
    assert {e["args"]["came_after_first_us"] for e in trace.slices if e["pid"] == 1} == {20.0}
    assert {e["args"]["last_to_come"] for e in trace.slices} == {"rank 0"}
    # One comparison, of a rank that was killed: no drift is known.
    merge.merge([parts[0], ("1", part(1, wrong, readings[:1]))], tmp_path / "t.json")
    first = next(e for e in Trace(tmp_path / "t.json").slices if e["pid"] == 2)
    assert first["ts"] == 0.0


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(part(0, [(1, 1)], [(0, 0)]))
    (tmp_path / "other").write_bytes(part(1, [(1, 1)], [(0, 0)], job="b"))
    (tmp_path / "empty").write_bytes(b"")
    for name, why in (
        ("good", "are both of rank 0"),
        ("other", "are parts of different traces"),
        ("empty", "is no rank's part of a trace"),
        ("none", "No such file"),
    ):
        done = trace_tool("merge", good, tmp_path / name, "-o", tmp_path / "t.json")
        assert done.returncode == 1
        assert why in done.stderr
        assert not (tmp_path / "t.json").exists()
    done = trace_tool("merge", good, "-o", tmp_path / "t.json")
    assert (done.returncode, done.stderr) == (0, "collective trace merge: there is no part of rank 1\n")
    Trace(tmp_path / "t.json")
    done = trace_tool("merge", good, "-o", tmp_path / "no folder" / "t.json")
    assert done.returncode == 1


@pytest.mark.ranks(2, 3)
def test_clocks_of_other_ranks(world: World) -> None:
    """Of one machine: ahead by what they are made to be, as exact as the round trip says."""
    lead = 7.0 * world.rank
    found = clocks.compare(world.comm, [0, *range(world.size - 1, 0, -1)], lambda: time.monotonic() + lead)
    assert found[0].ahead == found[0].delay == 0
    for rank, reading in zip(range(world.size - 1, 0, -1), found[1:], strict=True):
        assert abs(reading.ahead - 7.0 * rank) <= reading.delay / 2
        assert reading.delay > 0
    assert len(set(world.comm.allgather(str(found)))) == 1


def test_ranks_that_leave_without_the_others_keep_their_parts(tmp_path: Path) -> None:
    """Rank 1 ends by an exception; the launcher ends the job."""
    code = """
import numpy as np
import collective
collective.init()
collective.allreduce(np.ones(3), name="x")
if collective.rank() == 1:
    raise RuntimeError("enough")
collective.allreduce(np.ones(3), name="y")
"""
    done = run_ranks(2, ["-c", code], 60, env={"COLLECTIVE_TRACE": str(tmp_path / "t.json")})
    assert done.returncode != 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.rank0.json", "t.rank1.json"]
    assert '"x"' in (tmp_path / "t.rank1.json").read_text()
