"""`python -m collective.doctor`: what its checks say of made-up facts, and real runs."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from collective import _core
from collective.config import launched_number, launcher_variables
from collective.doctor import alike, checks, cli, gpus, host, launch, measure, memory, network, placement, surroundings
from collective.doctor.facts import Facts, collect
from collective.doctor.findings import Finding, Level, by_value, fail, ok, rate_text, size_text, time_text, warn, worst
from collective.doctor.job import AllReduce, Job, Measured, Pair
from collective.doctor.measure import rounds
from collective.doctor.report import as_json, as_text
from harness.mpirun import environment, run_ranks

ROOT = Path(__file__).parents[1]
GOOD: Facts = {
    "errors": {},
    "host": "one",
    "versions": {"collective": "1.0", "python": "3.12.1", "torch": "2.9", "machine": "64-bit little-endian"},
    "mpi": {"name": "Open MPI 5.0.8", "path": "/lib/libmpi.so", "built_for": "Open MPI 5.0.8", "other_version": ""},
    "launcher": {"launcher": "mpirun", "variable": "OMPI_COMM_WORLD_SIZE", "value": "4", "ranks": 4},
    "process_management": "PMIx 5",
    "settings": {},
    "transports": {},
    "malloc": {},
    "threads": "2",
    "cores": list(range(8)),
    "cores_there": 8,
    "load": 0.1,
    "quota": 0.0,
    "limits": {"memlock": -1, "nofile": 65536, "nproc": -1},
    "memory": {"total": 64 << 30, "available": 60 << 30, "swap": 0, "swap_used": 0, "limit": 0, "used": 0},
    "shm": {"size": 32 << 30, "free": 32 << 30},
    "huge_pages": "madvise",
    "rdma": [],
    "devices": [],
    "device_names": [],
    "no_devices": "no CUDA driver",
    "visible_devices": "all",
    "kernels": "no device",
    "cupy": "none",
    "packages": ["/site/collective"],
    "mpi4py_mpi": "Open MPI 5.0.8",
    "thread_level": "MPI_THREAD_MULTIPLE",
    "node": 0,
    "shared_memory": "",
    "warnings": [],
}


def job(size: int = 4, *, ranks_per_node: int = 4, error: str = "", measured: Measured | None = None) -> Job:
    """A job in which all is well, on hosts one, two, three, ..."""
    ranks = [copy.deepcopy(GOOD) for _ in range(size)]
    for rank, facts in enumerate(ranks):
        node = rank // ranks_per_node
        facts.update(node=node * ranks_per_node, host=["one", "two", "three", "four", "five"][node])
    return Job(ranks, error, measured or Measured())


def change(of: Job, rank: int, **facts: Any) -> None:
    """Replace facts of one rank; those of a dictionary are merged."""
    known: dict[str, Any] = of.ranks[rank]  # type: ignore[assignment]
    for name, value in facts.items():
        known[name] = {**known[name], **value} if isinstance(known[name], dict) else value


def told(findings: list[Finding]) -> tuple[str, str]:
    """The worst level, and all that is said at that level."""
    level = worst(findings)
    for finding in findings:
        assert finding.text
        assert bool(finding.remedy) == (finding.level > Level.OK) or finding.text.startswith("init() warns")
    return level.word, "\n".join(f"{f.text} -> {f.remedy}" for f in findings if f.level == level)


@pytest.mark.parametrize(("size", "per_node"), [(1, 1), (4, 4), (4, 2), (6, 2)])
def test_where_all_is_well_no_check_complains(size: int, per_node: int) -> None:
    well = job(size, ranks_per_node=per_node)
    if size == 1:
        well.ranks[0]["launcher"] = None
    firsts = list(well.nodes)
    pairs = [Pair((a, b), 2e-6, 2e-6, 1e10) for a in firsts for b in firsts if a < b]
    well.measured.node_pairs = pairs
    well.measured.ways = [("10.0.0.1", "eth0")] * len(firsts)
    well.measured.clocks = [0.0001] * len(firsts)
    well.measured.local_pairs = [Pair((a, a + 1), 5e-7, 5e-7, 1e10) for a in firsts if per_node > 1]
    well.measured.all_reduces = [AllReduce(4096, 1e-5, []), AllReduce(64 << 20, 0.1, [])]
    found = checks.run(well)
    assert [(name, finding) for name, finding in found if finding.level > Level.OK] == []
    silent = set(checks.CHECKS) - {name for name, _ in found}
    assert silent <= {"facts", "addresses", "network", "clocks", "node"}


# ---- the start ----


def test_singletons() -> None:
    alone = job(1, error="WORLD_SIZE=2, so this process is one of several")
    change(alone, 0, launcher={"launcher": "torchrun", "variable": "WORLD_SIZE", "value": "2", "ranks": 2})
    alone.ranks[0]["process_management"] = ""
    level, text = told(launch.launcher(alone))
    assert level == "fail"
    assert "torchrun (WORLD_SIZE=2, with neither PMI nor PMIx) has started 2 processes" in text
    found = checks.run(alone)
    assert found[0][0] == "start"
    assert found[0][1].level == Level.FAIL
    assert "WORLD_SIZE=2, so this process is one of several" in found[0][1].text


def test_what_init_warns_of_is_passed_on_unless_a_check_says_more() -> None:
    warned = job()
    warned.ranks[0]["warnings"] = ["cannot share memory: no", "core 99 does not exist"]
    warned.ranks[1]["warnings"] = ["core 99 does not exist"]
    assert told(launch.start(warned)) == ("warn", "init() warns: core 99 does not exist -> ")


def test_two_mpis() -> None:
    mixed = job()
    change(mixed, 3, mpi={"name": "MPICH 4.2"})
    assert told(launch.library(mixed))[0] == "fail"
    mixed = job()
    mixed.ranks[2]["mpi4py_mpi"] = "MPICH 4.2"
    level, text = told(launch.library(mixed))
    assert level == "fail"
    assert "MPICH 4.2: rank 2" in text
    mixed = job()
    change(mixed, 0, mpi={"other_version": "built for another"})
    assert told(launch.library(mixed))[0] == "warn"
    single = job()
    single.ranks[1]["thread_level"] = "MPI_THREAD_SINGLE"
    level, text = told(launch.library(single))
    assert level == "fail"
    assert "MPI_THREAD_SINGLE: rank 1" in text


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({}, 0),
        ({"RANK": "3"}, 0),  # without a WORLD_SIZE it may be anybody's
        ({"RANK": "3", "WORLD_SIZE": "4", "PMIX_RANK": "1"}, 3),
        ({"PMIX_RANK": "1"}, 1),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, 2),
    ],
)
def test_the_number_that_a_launcher_gives(
    variables: dict[str, str], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", *launcher_variables()):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_number() == number


# ---- places ----


def test_uneven_hosts() -> None:
    level, text = told(placement.ranks(job(5, ranks_per_node=2)))
    assert level == "warn"
    assert "5 ranks on 3 hosts: one 2 (8 cores), two 2 (8 cores), three 1 (8 cores)" in text


def test_ranks_on_one_core() -> None:
    bound = job()
    for rank in (1, 3):
        bound.ranks[rank]["cores"] = [5]
    level, text = told(placement.cores(bound))
    assert level == "warn"
    assert "ranks 1, 3 share core 5 of the 8 of one" in text
    assert "slot:PE=2" in text
    for rank in (0, 2):
        bound.ranks[rank]["cores"] = [7]
    text = told(placement.cores(bound))[1]
    assert text.startswith("ranks 1, 3 share core 5 of the 8 and ranks 0, 2 share core 7 of the 8 of one")
    for rank in range(3):
        bound.ranks[rank]["cores"] = [2, 3]
    assert told(placement.cores(bound))[1].startswith("ranks 0-2 share cores 2, 3 of the 8 of one")


def test_a_core_for_each_rank_is_not_enough() -> None:
    bound = job()
    for rank in range(4):
        bound.ranks[rank]["cores"] = [rank]
    level, text = told(placement.cores(bound))
    assert level == "warn"
    assert "ranks 0-3 may use one core of the 8 of one" in text
    for facts in bound.ranks:
        facts.update(cores=[0, 1, 2], cores_there=3)
    assert "share the 3 cores of one" in told(placement.cores(bound))[1]


def test_a_quota_of_cores() -> None:
    limited = job()
    for facts in limited.ranks:
        facts["quota"] = 2.0
    level, text = told(placement.cores(limited))
    assert level == "warn"
    assert "grants 2 cores' time to the 4 ranks of one" in text


@pytest.mark.parametrize(
    ("threads", "level", "remedy"),
    [("2", "ok", ""), ("1", "ok", ""), ("", "warn", "OMP_NUM_THREADS=2,"), ("4,2", "warn", "OMP_NUM_THREADS=2,")],
)
def test_threads(threads: str, level: str, remedy: str) -> None:
    threaded = job()
    for facts in threaded.ranks:
        facts["threads"] = threads
    said = told(placement.threads(threaded))
    assert said[0] == level
    assert remedy in said[1]


# ---- memory ----


@pytest.mark.parametrize(
    ("why", "remedy"),
    [
        ("COLLECTIVE_SHARED_MEMORY=0 on 1 of 8 ranks", "Unset it"),
        ("rank 5: /proc/7/fd/3: Permission denied", "SYS_PTRACE"),
        ("rank 5: /proc/7/fd/3: No such file or directory", "PID namespace"),
    ],
)
def test_memory_that_is_not_shared(why: str, remedy: str) -> None:
    apart = job(8)
    for rank in range(4, 8):
        apart.ranks[rank]["shared_memory"] = why
    level, text = told(memory.shared(apart))
    assert level == "warn"
    assert text.startswith("ranks 4-7 do not share memory")
    assert why in text
    assert remedy in text


def test_dev_shm() -> None:
    small = job(8)
    for rank in range(4, 8):
        change(small, rank, shm={"size": 64 << 20, "free": 63 << 20})
    level, text = told(memory.shm(small))
    assert level == "warn"
    assert "63 MiB of 64 MiB are free on two, and MPI may want 64 MiB" in text
    for rank in range(4, 8):
        change(small, rank, shm={"size": 0, "free": 0})
    assert "two has no /dev/shm" in told(memory.shm(small))[1]


def test_memory_and_swap() -> None:
    tight = job()
    change(tight, 0, memory={"limit": 4 << 30, "used": 3 << 30})
    level, text = told(memory.host_memory(tight))
    assert level == "warn"
    assert "grants 4 GiB, of which 3 GiB are used: little for 4 ranks on one" in text
    swapped = job()
    change(swapped, 0, memory={"swap": 8 << 30, "swap_used": 7 << 30})
    assert "7 GiB of one are swapped out" in told(memory.host_memory(swapped))[1]


def test_huge_pages() -> None:
    small = job()
    small.ranks[0]["huge_pages"] = "never"
    assert told(memory.huge_pages(small))[0] == "warn"


def test_limits() -> None:
    limited = job()
    change(limited, 0, limits={"memlock": 8 << 20})
    assert told(memory.limits(limited))[0] == "ok"
    limited.ranks[0]["rdma"] = ["mlx5_0"]
    assert "whose mlx5_0 must lock memory" in told(memory.limits(limited))[1]
    change(limited, 0, limits={"nproc": 50})
    assert "processes (ulimit -u) 50" in told(memory.limits(limited))[1]
    change(limited, 0, limits={"nofile": 64})
    assert told(memory.limits(limited))[0] == "fail"


# ---- what is alike ----


def test_versions() -> None:
    mixed = job(8)
    change(mixed, 6, versions={"torch": "2.8"})
    assert told(alike.versions(mixed))[0] == "warn"
    assert "torch differs: 2.9: ranks 0-5, 7; 2.8: rank 6" in told(alike.versions(mixed))[1]
    change(mixed, 7, versions={"collective": "0.9"})
    assert told(alike.versions(mixed))[0] == "fail"


def test_settings() -> None:
    mixed = job()
    mixed.ranks[1]["settings"] = {"COLLECTIVE_TIMEOUT": "5", "COLLECTIVE_TIMELINE": "x.json"}
    level, text = told(alike.settings(mixed))
    assert level == "warn"
    assert "COLLECTIVE_TIMEOUT differs (rank 0's holds for all): not set: ranks 0, 2, 3; 5: rank 1" in text
    assert "TIMELINE" not in text


# ---- the network ----


def test_rounds_hold_each_pair_once_and_nobody_twice() -> None:
    for count in range(2, 10):
        met = []
        for pairs in rounds(count):
            busy = [node for pair in pairs for node in pair]
            assert len(set(busy)) == len(busy)
            met += pairs
        assert sorted(met) == [(a, b) for a in range(count) for b in range(a + 1, count)]


def test_a_slow_pair() -> None:
    pairs = [Pair((a, b), 2e-6, 2e-6, 1e10) for a in range(4) for b in range(a + 1, 4)]
    assert network.slow_pairs(pairs) == []
    pairs[1] = Pair((0, 2), 2e-6, 2e-6, 1e9)
    pairs[4] = Pair((1, 3), 90e-6, 90e-6, 1e10)
    assert network.slow_pairs(pairs) == [pairs[1], pairs[4]]
    slow = job(4, ranks_per_node=1, measured=Measured(node_pairs=pairs, node_pairs_left=3))
    level, text = told(network.between_nodes(slow))
    assert level == "warn"
    assert "rank 0 (one) and rank 2 (three): 2 us, 1 GB/s, against a median of 10 GB/s and 2 us" in text
    assert "the time was up before 3 other pairs" in network.between_nodes(slow)[0].text
    assert network.slow_pairs(pairs[:2]) == []  # which of two is the odd one?


def test_many_slow_pairs_are_counted() -> None:
    pairs = [Pair((a, b), 2e-6, 2e-6, 1e9 if a == 0 else 1e10) for a in range(11) for b in range(a + 1, 11)]
    ranks = [{**copy.deepcopy(GOOD), "node": rank} for rank in range(11)]
    text = told(network.between_nodes(Job(ranks, measured=Measured(node_pairs=pairs))))[1]  # type: ignore[arg-type]
    assert "7 more pairs of hosts are as slow" in text


def test_ranks_that_wait_for_a_core() -> None:
    busy = job(measured=Measured(local_pairs=[Pair((0, 1), 5e-7, 4e-3, 1e9)]))
    level, text = told(network.within_nodes(busy))
    assert level == "warn"
    assert "half take more than 4 ms" in text


def test_clocks_and_addresses() -> None:
    two = job(4, ranks_per_node=2, measured=Measured(clocks=[0.0, -0.25], ways=[("10.0.0.1", "eth0"), None]))
    assert told(network.clocks(two))[0] == "warn"
    assert "two by -250 ms" in told(network.clocks(two))[1]
    assert told(network.way(two))[0] == "warn"


def test_a_wrong_sum() -> None:
    wrong = job(measured=Measured(all_reduces=[AllReduce(4096, 1e-5, []), AllReduce(64 << 20, 0.1, [2])]))
    level, text = told(network.all_reduces(wrong))
    assert level == "fail"
    assert "an all-reduce of 64 MiB gives a wrong sum on rank 2 (one)" in text


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("firsts", "budget", "met"),
    [
        ([0, 1, 2, 3], 8.0, 6),
        ([0, 1, 2, 3], 0.0, 2),
        ([0, 0, 2, 3], 8.0, 3),
        ([0, 0, 0, 3], 8.0, 1),
        ([0, 0, 0, 0], 8.0, 0),
    ],
)
def test_all_pairs_are_measured_or_counted(
    world: Any, firsts: list[int], budget: float, met: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of one node, as if on several."""
    monkeypatch.setattr(measure, "_BUDGET_S", budget)
    nodes = [[rank for rank in range(4) if firsts[rank] == first] for first in dict.fromkeys(firsts)]
    pairs, left = measure.between_nodes(world.comm, nodes)
    assert len({pair.ranks for pair in pairs}) == len(pairs) == met
    assert met + left == len(nodes) * (len(nodes) - 1) // 2
    for pair in pairs:
        assert set(pair.ranks) <= set(firsts)
        assert 0 < pair.latency <= pair.typical
        assert pair.bandwidth > 0
    offsets = measure.clocks(world.comm, nodes)
    assert len(offsets) == len(nodes)
    assert max(map(abs, offsets)) < 1  # of one clock; as exact as the ranks are prompt
    local = measure.within_nodes(world.comm, nodes)
    assert [pair.ranks for pair in local] == [(members[0], members[1]) for members in nodes if len(members) > 1]


# ---- the host's files ----


def group(path: Path, **files: str) -> None:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text + "\n")


def test_control_groups_of_version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrowest of those around this process counts; one that cannot be seen from here is passed over."""
    group(tmp_path / "pod", memory__max="8000", memory__current="100", cpu__max="250000 100000")
    group(tmp_path / "pod" / "box", memory__max="max", memory__current="50", cpu__max="max 100000")
    (tmp_path / "self").write_text("0::/pod/box/unseen\n")
    monkeypatch.setattr(host, "_GROUPS", tmp_path)
    monkeypatch.setattr(host, "_MEMBERSHIP", tmp_path / "self")
    assert host.core_quota() == 2.5
    found = host.memory()
    assert (found["limit"], found["used"]) == (8000, 100)
    assert found["total"] > found["available"] > 0


def test_control_groups_of_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group(tmp_path / "memory" / "box", memory__limit_in_bytes="9000", memory__usage_in_bytes="10")
    group(tmp_path / "memory" / "none", memory__limit_in_bytes=str((1 << 63) - 4096), memory__usage_in_bytes="10")
    group(tmp_path / "cpu" / "box", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    group(tmp_path / "cpu" / "none", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    monkeypatch.setattr(host, "_GROUPS", tmp_path)
    monkeypatch.setattr(host, "_MEMBERSHIP", tmp_path / "self")
    for name, quota, memory_of in (("box", 0.5, (9000, 10)), ("none", 0.0, (0, 0))):
        (tmp_path / "self").write_text(f"3:cpu,cpuacct:/{name}\n2:memory:/{name}\n1:name=systemd:/\n")
        (tmp_path / "cpu,cpuacct").unlink(missing_ok=True)
        assert host.core_quota() == quota
        assert (host.memory()["limit"], host.memory()["used"]) == memory_of


# ---- devices and surroundings ----


def test_devices() -> None:
    shared = job()
    for rank in range(3):
        shared.ranks[rank].update(devices=["a", "b"], device_names=["H100", "H100"], kernels="")
    shared.ranks[1]["kernels"] = "no NVRTC"
    level, text = told(gpus.gpus(shared))
    assert level == "warn"
    assert "no device on rank 3, though others have one: no CUDA driver" in text
    assert "one has 0 H100, 1 H100; ranks 0, 2 share one" in text
    assert "rank 1: no kernels, so arrays go by way of the host: no NVRTC" in text
    own = job(2, measured=Measured(cuda_aware="yes: tried"))
    for facts in own.ranks:
        facts.update(devices=["a", "b"], device_names=["H100", "H100"], kernels="")
    assert told(gpus.gpus(own))[0] == "ok"
    far = job(2, ranks_per_node=1, measured=Measured(cuda_aware="no: tried"))
    for facts in far.ranks:
        facts.update(devices=["a"], device_names=["H100"], kernels="")
    assert "no: tried; between nodes, arrays go by way of the hosts" in told(gpus.gpus(far))[1]
    assert told(gpus.gpus(job())) == ("ok", "no device: no CUDA driver -> ")


def test_a_package_that_hides_another() -> None:
    hidden = job()
    hidden.ranks[2]["packages"].append("/home/old/collective")
    level, text = told(surroundings.packages(hidden))
    assert level == "warn"
    assert "rank 2 (one) uses /site/collective, which hides /home/old/collective" in text


@pytest.mark.parametrize(
    ("malloc", "level"),
    [
        ({"MALLOC_TRIM_THRESHOLD_": "1"}, "warn"),
        ({"MALLOC_TRIM_THRESHOLD_": "1", "MALLOC_MMAP_THRESHOLD_": "1"}, "ok"),
        ({"MALLOC_TRIM_THRESHOLD_": "1", "LD_PRELOAD": "/lib/libjemalloc.so.2"}, "ok"),
    ],
)
def test_malloc(malloc: dict[str, str], level: str) -> None:
    chosen = job()
    chosen.ranks[0]["malloc"] = malloc
    assert told(surroundings.allocator(chosen))[0] == level


# ---- the frame ----


def test_a_check_that_fails_is_a_line_of_the_report() -> None:
    broken = job()
    del broken.ranks[0]["shm"]
    broken.ranks[0]["errors"] = {"shm": "OSError: Input/output error"}
    found = checks.run(broken)
    failed = {name: finding.text for name, finding in found if finding.level == Level.FAIL}
    assert failed == {
        "/dev/shm": "this check ended in KeyError: 'shm'",
        "facts": "rank 0 could not tell shm: OSError: Input/output error",
    }


def test_a_fact_that_cannot_be_found_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise OSError("no such thing")

    monkeypatch.setitem(sys.modules["collective.doctor.facts"]._FINDERS, "load", broken)
    found = collect()
    assert found["errors"] == {"load": "OSError: no such thing"}
    assert "load" not in found
    assert found["cores"]


def test_text() -> None:
    found = [("one", ok("fine")), ("two", warn("a " * 70, "Do it.")), ("two", fail("bad", ""))]
    assert as_text(found, coloured=False).splitlines() == [
        "ok    one  fine",
        "warn  two  " + ("a " * 55).rstrip(),
        "           " + ("a " * 15).rstrip(),
        "           -> Do it.",
        "fail       bad",
        "1 fail, 1 warn, 1 ok",
    ]
    coloured = as_text(found, coloured=True)
    assert "\033[1;31mfail\033[0m" in coloured
    assert re.sub(r"\033\[[\d;]*m", "", coloured) == as_text(found, coloured=False)
    content = json.loads(as_json(job(), found))
    assert content["verdict"] == "fail"
    assert content["findings"][2] == {"check": "two", "level": "fail", "text": "bad", "remedy": ""}


def test_words() -> None:
    assert by_value(["a", "b", "a"]) == "a: ranks 0, 2; b: rank 1"
    assert [size_text(n) for n in (8, 4096, 3 << 29)] == ["8 B", "4 KiB", "1.5 GiB"]
    assert [time_text(t) for t in (1.5e-6, 0.02, -0.25, 3.0)] == ["1.5 us", "20 ms", "-250 ms", "3 s"]
    assert [rate_text(r) for r in (12e6, 1.25e9)] == ["12 MB/s", "1.25 GB/s"]


# ---- real runs ----

DOCTOR = ["-m", "collective.doctor"]


def levels(content: dict[str, Any]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for finding in content["findings"]:
        found.setdefault(finding["check"], set()).add(finding["level"])
    return found


def alone(*arguments: str, cwd: Path | None = None, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *arguments]
    env = {**environment(), **env}
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_alone(tmp_path: Path) -> None:
    done = alone(*DOCTOR, "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\033" not in done.stdout
    assert "0 fail" in done.stdout.splitlines()[-1]
    content = json.loads((tmp_path / "found.json").read_text())
    assert levels(content)["start"] == {"ok"}
    assert levels(content)["all-reduce"] == {"ok"}
    assert len(content["ranks"]) == 1


@pytest.mark.parametrize("size", [2, 4])
def test_on_ranks(size: int) -> None:
    done = run_ranks(size, [*DOCTOR, "--json", "-"], 60)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(done.stdout)  # of one rank
    assert content["verdict"] != "fail"
    assert len(content["ranks"]) == size
    found = levels(content)
    for check in ("start", "MPI", "launcher", "shared memory", "versions", "all-reduce"):
        assert found[check] == {"ok"}, (check, content["findings"])
    assert [result["wrong"] for result in content["measured"]["all_reduces"]] == [[]] * 2


def test_settings_of_one_rank() -> None:
    """A warning where they differ; where one is malformed, a failure on all ranks, and no rank that waits."""
    script = """
import os, sys
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 1:
    os.environ["{}"] = "0"
from collective.doctor import main
sys.exit(main(["--json", "-"]))
"""
    done = run_ranks(2, ["-c", script.format("COLLECTIVE_SHARED_MEMORY")], 60)
    assert done.returncode == 0, done.stderr
    found = levels(json.loads(done.stdout))
    assert found["shared memory"] == found["settings"] == {"warn"}
    done = run_ranks(2, ["-c", script.format("COLLECTIVE_SHARED_MEMORIES")], 60)
    assert done.returncode == 1
    first = json.loads(done.stdout)["findings"][0]
    assert first["level"] == "fail"
    assert first["text"].startswith("init() fails: rank 1: unknown setting COLLECTIVE_SHARED_MEMORIES")


def test_versions_that_differ(tmp_path: Path) -> None:
    """init() refuses on all ranks; the rest is checked, and every rank has the status."""
    script = """
import sys
from pathlib import Path
from mpi4py import MPI
from collective import version
rank = MPI.COMM_WORLD.rank
version.__version__ = f"0.{rank}"
from collective.doctor import main
status = main(["--json", str(Path(sys.argv[1], "found.json"))])
Path(sys.argv[1], f"status{rank}").write_text(str(status))
"""
    done = run_ranks(2, ["-c", script, tmp_path], 60)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"status{rank}").read_text() for rank in range(2)] == ["1", "1"]
    content = json.loads((tmp_path / "found.json").read_text())
    failed = [(f["check"], f["text"]) for f in content["findings"] if f["level"] == "fail"]
    assert [check for check, _ in failed] == ["start", "versions"]
    assert "cannot work together" in failed[0][1]
    assert failed[1][1] == "collective differs: 0.0: rank 0; 0.1: rank 1"
    assert len(content["measured"]["local_pairs"]) == 1


def test_a_copy_on_pythonpath(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "collective", tmp_path / "collective", ignore=shutil.ignore_patterns("__pycache__"))
    # The engine looks for its MPI beside where it was built.
    libraries = str(Path(_core.running_mpi_path()).parent)
    done = alone(*DOCTOR, cwd=tmp_path.parent, PYTHONPATH=str(tmp_path), LD_LIBRARY_PATH=libraries)
    assert done.returncode == 0, done.stderr
    said = re.sub(r"\s+", " ", done.stdout)
    assert f"uses {tmp_path}/collective, which hides " in said


def test_ranks_that_do_not_see_each_other() -> None:
    """The engine's own reason is in the report, and no longer on stderr."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on PATH (util-linux)")
    hidden = ["unshare", "--pid", "--fork"]  # /proc stays that of the outer namespace
    tried = subprocess.run([*hidden, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no namespaces for this user: {tried.stderr.strip()}")
    done = run_ranks(2, [*DOCTOR, "--json", "-"], 60, under=hidden)
    assert done.returncode == 0, done.stderr
    texts = [f["text"] for f in json.loads(done.stdout)["findings"] if f["check"] == "shared memory"]
    assert len(texts) == 1
    assert "do not share memory" in texts[0]
    assert "/proc/" in texts[0]
    assert "[collective]" not in done.stderr


def test_a_launcher_of_singletons() -> None:
    """As under torchrun: the first process speaks, all fail."""
    first = alone(*DOCTOR, RANK="0", WORLD_SIZE="2")
    assert first.returncode == 1
    assert first.stdout.startswith("fail  start")
    second = alone(*DOCTOR, RANK="1", WORLD_SIZE="2")
    assert second.returncode == 1
    assert second.stdout == second.stderr == ""


def test_another_mpi_than_mpi4py_s() -> None:
    """What needs no runtime is still checked."""
    script = """
import sys
from collective import _core
_core.running_mpi = lambda: "MPICH Version: 4.2"
from collective.doctor import main
sys.exit(main([]))
"""
    done = alone("-c", script)
    assert done.returncode == 1
    assert re.match(r"fail  start +init\(\) fails: this package was built for", done.stdout)
    assert re.search(r"^ok +/dev/shm", done.stdout, re.MULTILINE)


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._report(job(), str(tmp_path / "missing" / "x.json")) == 1
    said = capsys.readouterr()
    assert said.out.startswith("ok    start")
    assert "cannot be written" in said.err


def test_wrong_arguments_are_said_once() -> None:
    done = run_ranks(2, [*DOCTOR, "--jason"], 60)
    assert done.returncode == 2
    assert done.stderr.count("unrecognized arguments: --jason") == 1


def test_colours_on_a_terminal_only() -> None:
    code = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    done = alone("-c", code, sys.executable, *DOCTOR, TERM="xterm")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("\033[32mok  \033[0m  start")


@pytest.mark.parametrize(
    ("settings", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"PMIX_RANK": "0"}, False)],
)
def test_what_speaks_against_colours(settings: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's wish, and a launcher: the terminal that mpirun makes for its ranks may lead anywhere."""
    for name in ("NO_COLOR", *launcher_variables()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli._coloured() is coloured


def test_a_stage_that_hangs_ends_the_job() -> None:
    script = """
import time
from mpi4py import MPI
from collective.doctor.watch import Watch
with Watch().stage("a message that never comes", 0.5):
    MPI.COMM_WORLD.recv(source=MPI.COMM_WORLD.rank)
"""
    done = run_ranks(2, ["-c", script], 60)
    assert done.returncode != 0
    for rank in range(2):
        assert f"rank {rank} has not come to the end of this within 0.5 s: a message that never comes" in done.stderr
