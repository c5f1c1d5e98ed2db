"""The verdict on a hang: who waits for whom, and what those do; once for each cause."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster import Cluster, why_not
from collective.outofband import Process, Silence
from collective.verdict import Rank, Verdict, judge
from harness.mpirun import run_ranks

SCRIPT = Path(__file__).with_name("hanging.py")
LIMITS = {"COLLECTIVE_STALL_WARNING": "1", "COLLECTIVE_TIMEOUT": "5"}

# By kind: what is told, in order; {n} is a number.
TOLD = {
    "in a loop": [
        "rank 0: stalled for .* s: ranks 0, 2 wait for rank 1\n",
        "  allreduce 'loss': ranks 0, 2 wait; rank 1 has not submitted it\n",
        r"  rank 1 \(process \d+\): script at hanging.py:\d+ in validate, called from hanging.py:\d+ in hang, called",
    ],
    "in a queue": [
        "rank 0: stalled for .* s: ranks 0, 2 wait for rank 1\n",
        r"  rank 1 \(process \d+\): script at (threading|queue).py:.* called from hanging.py:\d+ in load, called",
    ],
    "after an error": [
        "rank 0: stalled for .* s: ranks 0, 2 wait for rank 1\n",
        r"  rank 1 \(process \d+\): script at hanging.py:\d+ in validate, called from hanging.py:\d+ in hang, called",
    ],
    "stopped": [
        "rank 0: stalled for .* s: ranks 0, 2 wait for rank 1\n",
        "  allreduce 'loss': ranks 0, 2 wait; rank 1 does not answer\n",
        r"  rank 1 \(process (\d+)\): stopped by a signal or a debugger; kill -CONT \1 on its host lets it go on\n",
    ],
    "rank 0 stopped": [
        "rank 1: stalled for .* s: ranks 1, 2 wait for rank 0\n",
        "  allreduce 'loss': ranks 1, 2 wait; rank 0 does not answer\n",
        r"  rank 0 \(process (\d+)\): stopped by a signal or a debugger; kill -CONT \1 on its host lets it go on\n",
    ],
    "interpreter locked": [
        "rank 0: stalled for .* s: ranks 0, 2 wait for rank 1\n",
        r"  rank 1 \(process (\d+)\): alive, but Python's threads do not run: .*; py-spy dump --native --pid \1 on its",
    ],
    "in MPI": [
        "rank 0: stalled for .* s: ranks 0, 2 wait for rank 1\n",
        r"  rank 1 \(process \d+\): script at hanging.py:\d+ in hang, called from hanging.py:\d+\n",
    ],
    "crosswise": [
        "rank 0: stalled for .* s: ranks wait for each other\n",
        "  allreduce 'a': rank 0 waits; ranks 1, 2 have not submitted it\n",
        r"  rank 0 \(process \d+\): waiting for allreduce 'a', at hanging.py:\d+ in wait_for, called from",
        r"  ranks 1, 2: waiting for allreduce 'b', at hanging.py:\d+ in wait_for, called from",
    ],
    "behind others": [
        "rank 0: stalled for .* s: ranks 0, 2 wait for rank 1\n",
        r"  rank 1 \(process \d+\): script at hanging.py:\d+ in validate",
    ],
    "in a bucket": [
        "rank 0: stalled for .* s: ranks 0, 2 wait for rank 1\n",
        r"  bucket '\S+ \(2.bias to 0.weight, 4 parameters\)': ranks 0, 2 wait; rank 1 has not started run 3\n",
        r"  rank 1 \(process \d+\): script at hanging.py:\d+ in validate",
    ],
    "in a process set": [  # on a busy machine one of the two waits may begin too late to be told
        "rank 0: stalled for .* s: (ranks 0, 1 wait|rank [01] waits) for rank 2\n",
        r"(  process set \[0, 2\]: allreduce 'metric': rank 0 waits; rank 2 has|: rank 1 waits; ranks 0, 2 have) not ",
        r"  rank 2 \(process \d+\): script at hanging.py:\d+ in validate",
    ],
    "no message": [
        "rank 0: stalled for .* s: rank 0 waits for rank 1\n",
        "  recv from rank 1, tag 0: rank 0 waits",
        r"  rank 1 \(process \d+\): script at hanging.py:\d+ in validate",
    ],
    "torch": [
        "rank 0: stalled for .* s: ranks 0, 2 wait for rank 1\n",
        "  default process group: allreduce 'call 3': ranks 0, 2 wait; rank 1 has not reached it\n",
    ],
    "torch ddp": [
        "rank 0: stalled for .* s: ranks 0, 2 wait for rank 1\n",
        "  default process group: allreduce 'call .*': ranks 0, 2 wait; rank 1 has not reached it\n",
    ],
}


@pytest.mark.parametrize("kind", TOLD)
def test_the_verdict_on_a_hang(kind: str, tmp_path: Path) -> None:
    """Told once, on rank 0 or the lowest that answers, and written to the file with all stacks."""
    file = tmp_path / "verdicts"
    limits = {**LIMITS, "COLLECTIVE_VERDICT_FILE": str(file)}
    done = run_ranks(3, [str(SCRIPT), kind], 100, env=limits)
    assert done.returncode != 0
    verdicts = re.findall(r"\[collective\] rank \d: stalled for .*\n(?:  .*\n)*", done.stderr)
    # On a busy machine a rank that imports for long may have been told of before.
    assert len([text for text in verdicts if re.search(TOLD[kind][0], text)]) == 1, done.stderr
    at = 0
    for line in TOLD[kind]:
        found = re.search(line, verdicts[-1][at:])
        assert found is not None, verdicts[-1]
        at += found.end() - 1  # lines that begin where the last one ends share its newline
    told = file.read_text()
    assert verdicts[-1].split(": ", 1)[1] in told
    assert re.search(r"rank 2, \S+, process \d+: its main thread, innermost first:\n    \S+:\d+ in ", told), told


HERE = [Process("n0", 100 + rank, "10.0.0.1", 1) for rank in range(4)]
APART = [Process(f"n{rank // 2}", 100 + rank, f"10.0.0.{rank // 2}", 1) for rank in range(4)]


def in_flight(what: str = "allreduce 'a'", **more: Any) -> dict[str, Any]:
    known = {"key": what, "what": what, "state": "", "phase": "submitted", "seconds": 9.0}
    return {**known, "bucket": None, "run": 0, "peer": None, **more}


def rank(*flying: Mapping[str, Any], at: str = "t.py:1", waits: bool = True, **more: Any) -> Rank:
    group = {"label": "", "identity": "", "ranks": [0, 1, 2, 3], "started": [], "turns": 0, "joined": False}
    groups = [{**group, "in_flight": list(flying), **more}]
    return Rank(waits={"waited_for": waits, "shut_down": False, "groups": groups}, at=at)


def verdict(*ranks: Rank, processes: list[Process] = HERE) -> Verdict:
    found = judge(dict(enumerate(ranks)), processes, 8.0)
    assert found is not None
    return found


def test_nothing_is_told_of_a_short_wait() -> None:
    short = in_flight(seconds=3.0)
    assert judge({0: rank(short), 1: rank(waits=False)}, HERE, 8.0) is None


def test_a_host_that_does_not_answer_is_one_line() -> None:
    gone = Rank(silence=Silence.NO_HOST)
    told = verdict(rank(in_flight()), rank(in_flight()), gone, gone, processes=APART).text
    assert told == (
        "stalled for 9.0 s: ranks 0, 1 wait for ranks 2, 3 (n1)\n"
        "  allreduce 'a': ranks 0, 1 wait; ranks 2, 3 do not answer\n"
        "  ranks 2, 3 (n1): host does not answer: no connection to 10.0.0.1"
    )


def test_processes_that_are_gone_or_silent() -> None:
    ranks = [Rank(silence=Silence.NO_PROCESS), Rank(silence=Silence.NO_ANSWER), Rank(silence=Silence.NO_ANSWER)]
    told = verdict(rank(in_flight()), *ranks).text.splitlines()
    assert told[0] == "stalled for 9.0 s: rank 0 waits for ranks 1-3"
    assert told[2] == "  rank 1 (process 101): process gone, or it has shut down"
    assert told[3].startswith("  ranks 2, 3: process does not answer: it is stopped, or")


def test_a_process_that_its_host_knows_or_does_not_know() -> None:
    told = verdict(
        rank(in_flight()),
        Rank(silence=Silence.NO_PROCESS, process=""),
        Rank(silence=Silence.NO_PROCESS, process="S"),
        Rank(silence=Silence.NO_ANSWER, process="Z"),
    ).text
    assert "ranks 1, 3: process gone: it was killed, or it crashed" in told
    assert "rank 2 (process 102): shut down, but its process is still there" in told


def test_groups_of_the_same_ranks_are_told_apart() -> None:
    """Rank 0 in the 7th operation of one, rank 1 in the 7th of the other: a circle."""
    turn = in_flight("all_reduce", key="turn 7", run=7)
    other = {"label": "g: ", "identity": "B", "ranks": [0, 1], "started": [], "turns": 6, "joined": False}
    ranks = []
    for own, theirs in (("A", "B"), ("B", "A")):
        groups = [
            {**other, "identity": own, "turns": 7, "in_flight": [turn]},
            {**other, "identity": theirs, "in_flight": []},
        ]
        ranks.append(Rank(waits={"waited_for": True, "shut_down": False, "groups": groups}, at="t.py:1"))
    told = verdict(*ranks).text.splitlines()
    assert told[0] == "stalled for 9.0 s: ranks wait for each other"
    assert told[1:3] == [
        "  g: all_reduce: rank 0 waits; rank 1 has not reached it",
        "  g: all_reduce: rank 1 waits; rank 0 has not reached it",
    ]


def test_a_rank_that_has_come_late_to_something_else_is_told() -> None:
    other = in_flight("allreduce 'metric'", seconds=1.0)
    told = verdict(rank(in_flight()), rank(in_flight()), rank(in_flight()), rank(other, at="t.py:9")).text.splitlines()
    assert told[0] == "stalled for 9.0 s: ranks wait for each other"
    assert told[-1] == "  rank 3 (process 103): waiting for allreduce 'metric', at t.py:9"


def test_a_device_that_is_late() -> None:
    """What a rank has submitted, but its device has not come to, others wait for."""
    held = in_flight(key="", phase="not ready", state="waits for what its user has queued on device 0")
    told = verdict(rank(held), rank(in_flight()), rank(in_flight()), rank(waits=False)).text.splitlines()
    assert told[0] == "stalled for 9.0 s: ranks 1, 2 wait for ranks 0, 3"
    assert (
        "  rank 0 (process 100): allreduce 'a' waits for what its user has queued on device 0; script at t.py:1" in told
    )
    alone = verdict(*[rank(held)] * 4).text.splitlines()
    assert alone[:2] == [
        "stalled for 9.0 s: ranks 0-3 cannot go on",
        "  allreduce 'a': ranks 0-3 have not come to it on the device",
    ]


def test_a_rank_that_has_joined_waits_for_as_long_as_it_takes() -> None:
    joined = rank(in_flight("join", seconds=600.0), joined=True)
    assert judge({0: joined, 1: rank(waits=False)}, HERE, 8.0) is None
    told = verdict(joined, rank(in_flight()), rank(in_flight()), rank(waits=False)).text.splitlines()
    assert told[0] == "stalled for 9.0 s: ranks 1, 2 wait for rank 3"


def test_a_rank_that_has_shut_down() -> None:
    left = Rank(waits={"waited_for": False, "shut_down": True, "groups": []})
    told = verdict(rank(in_flight()), rank(in_flight()), rank(in_flight()), left).text.splitlines()
    assert told[-1] == "  rank 3 (process 103): shut down: its script ended, or it called shutdown()"


def test_an_engine_that_does_not_come_back() -> None:
    stuck = Rank(waits=None, at="t.py:7")
    told = verdict(rank(in_flight()), stuck, rank(in_flight()), rank(in_flight())).text.splitlines()
    assert told[-1] == "  rank 1 (process 101): engine inside MPI, from where it does not come back; script at t.py:7"


def test_what_all_ranks_have_started() -> None:
    runs = in_flight(phase="runs", state="waits for bytes of rank 1")
    told = verdict(*[rank(runs)] * 4).text.splitlines()
    assert told[0] == "stalled for 9.0 s: ranks 0-3 wait, and no rank is late"
    assert told[1] == "  allreduce 'a': ranks 0-3 wait; waits for bytes of rank 1"


def test_a_rank_that_has_joined_is_not_missed() -> None:
    joined = rank(waits=False, joined=True)
    told = verdict(rank(in_flight()), joined, rank(waits=False), rank(in_flight())).text.splitlines()
    assert told[0] == "stalled for 9.0 s: ranks 0, 3 wait for rank 2"


def test_many_waits_are_cut_short() -> None:
    flying = [in_flight(f"allreduce '{name}'", seconds=9.0 + number) for number, name in enumerate("abcdefgh")]
    told = verdict(rank(*flying), rank(waits=False), rank(*flying), rank(*flying)).text.splitlines()
    assert told[1].startswith("  allreduce 'h': ")
    assert told[7] == "  and 2 more"
    assert len(told) == 9


def test_the_same_cause_is_known_again() -> None:
    idle = rank(waits=False)
    first = verdict(rank(in_flight()), idle, idle, rank(in_flight()))
    later = verdict(rank(in_flight(), in_flight("allreduce 'b'")), idle, idle, rank(in_flight()))
    other = verdict(rank(in_flight()), idle, rank(in_flight()), rank(in_flight()))
    assert first.cause == later.cause != other.cause
    assert first.stalled & later.stalled


WHY_NOT = why_not()


@pytest.mark.slow
@pytest.mark.skipif(bool(WHY_NOT), reason=f"no cluster here: {WHY_NOT}")
@pytest.mark.parametrize("kind", ["stopped", "cut off"])
def test_what_is_wrong_on_another_host(kind: str) -> None:
    """Told apart by how the kernel of that host answers, and by what the other rank there sees."""
    told = {
        "stopped": r"rank 1 \(host0, process (\d+)\): stopped by a signal or a debugger; kill -CONT \1 on its host",
        "cut off": r"ranks 2, 3 \(host1\): host does not answer: no connection to 10.77.0.",
    }
    with Cluster([2, 2], rate=None) as cluster:
        job = cluster.start([sys.executable, str(SCRIPT), kind], env=LIMITS, stdout=subprocess.PIPE)
        assert job.stdout is not None
        output = ""
        # mpirun does not end by itself when it hears nothing from a host; the end of the cluster ends it.
        for line in job.stdout:
            output += line
            if "cut me off" in line:
                cluster.cut(1)
            if re.search(told[kind], output):
                break
        else:
            pytest.fail(output)
