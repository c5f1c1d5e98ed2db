"""Arrays on devices: the cases of device_cases.py on stand-ins for CuPy and the driver, and on real ones."""

import ctypes.util
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from collective import devices
from harness.mpirun import run_ranks
from test_csrc import BUILD, build

HERE = Path(__file__).parent
CASES = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", HERE / "device_cases.py"]


@pytest.fixture(scope="module")
def stand_in() -> dict[str, str]:
    """The environment in which they are found."""
    library = build("stand_in/libcuda.so.1").parent
    assert library == BUILD / "stand_in"
    paths = os.pathsep.join(filter(None, [str(library), os.environ.get("LD_LIBRARY_PATH")]))
    return {"LD_LIBRARY_PATH": paths, "PYTHONPATH": str(HERE / "stand_in")}


@pytest.fixture(scope="module")
def stand_in_nccl(stand_in: dict[str, str]) -> dict[str, str]:
    """The same with one for NCCL, asked for, and a device for each rank."""
    packages = build("stand_in/nccl/nvidia/nccl/lib/libnccl.so.2").parents[3]
    path = os.pathsep.join([stand_in["PYTHONPATH"], str(packages)])
    return {**stand_in, "PYTHONPATH": path, "COLLECTIVE_NCCL": "1", "STAND_IN_CUDA_OWN": "1"}


def has_device(count: int = 1) -> bool:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return False
    return listed.returncode == 0 and f"GPU {count - 1}" in listed.stdout


# MPI can send what the stand-in's devices have, where the host can touch it.
AWARE = {"STAND_IN_CUDA_OPEN": "1", "COLLECTIVE_CUDA_AWARE": "1"}
# At one number of ranks only.
LONG = "(get_there or for_ever or bounded or dropped)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "chosen", "settings"),
    [
        (1, f"memory and not {LONG}", {}),  # without others, one transport is like the other
        (2, f"memory or messages and not (values or {LONG})", {}),
        (3, f"messages and not {LONG} or memory and (optimizer or join or buckets or 100003)", AWARE),
    ],
    ids=["1", "2", "3-CUDA-aware"],
)
def test_cases_on_stand_ins(size: int, chosen: str, settings: dict[str, str], stand_in: dict[str, str]) -> None:
    done = run_ranks(size, [*CASES, "-k", chosen], 300, env=stand_in | settings)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_cases_with_nccl(size: int, stand_in_nccl: dict[str, str]) -> None:
    chosen = "memory and (order_of_each or nccl)"
    if size == 3:
        chosen = "memory and (100003 or values or order_of_each or nccl or buckets or optimizer or join)"
    # The host can touch what lies in buckets, which an optimizer's views need.
    done = run_ranks(size, [*CASES, "-k", chosen], 300, env=stand_in_nccl | AWARE)
    assert done.returncode == 0, done.stdout + done.stderr


SUMS = """
import os, cupy, numpy as np
import collective
collective.init()
{before}
x = cupy.asarray(np.full(100_000, collective.rank() + 1.0, "float32"))
for _ in range(3):
    y = collective.allreduce(x, collective.Sum)
    assert (y.get() == collective.size() * (collective.size() + 1) / 2).all()
print("summed")
"""


@pytest.mark.parametrize(
    ("before", "settings", "told"),
    [
        ("", {"STAND_IN_CUDA_OWN": None}, "rank 0: it shares a device with rank 1"),
        ("", {"STAND_IN_NCCL_FAIL": "ncclGetUniqueId"}, "rank 0: NCCL: ncclGetUniqueId: the stand-in's error"),
        (
            "if collective.rank() == 1: os.environ['STAND_IN_NCCL_FAIL'] = 'ncclCommInitRankConfig'",
            {},
            "rank 1: NCCL: ncclCommInitRankConfig: the stand-in's error",
        ),
        (
            "if collective.rank() == 1: os.environ['STAND_IN_NCCL_FAIL'] = 'connect'",
            {},
            "rank 1: NCCL: ncclCommInitRankConfig: the stand-in's error",
        ),
        ("", {"COLLECTIVE_SHARED_MEMORY": "0"}, "the ranks are on several nodes, or share no memory"),
    ],
    ids=["shared device", "no id", "one cannot begin", "one cannot connect", "messages"],
)
def test_ranks_that_nccl_does_not_connect(
    before: str, settings: dict[str, str | None], told: str, stand_in_nccl: dict[str, str]
) -> None:
    """Kernels of the package then make the sums, or the host, and one warning says why."""
    env = {name: value for name, value in (stand_in_nccl | settings).items() if value is not None}
    done = run_ranks(3, ["-c", SUMS.format(before=before)], 60, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("summed") == 3
    assert done.stderr.count(f"COLLECTIVE_NCCL=1, but NCCL is not used: {told}") == 1, done.stderr


def test_nccl_that_is_not_there(stand_in: dict[str, str]) -> None:
    if devices._nccl_files() or ctypes.util.find_library("nccl") is not None:
        pytest.skip("NCCL is installed")
    env = {**stand_in, "COLLECTIVE_NCCL": "1", "STAND_IN_CUDA_OWN": "1"}
    done = run_ranks(2, ["-c", SUMS.format(before="")], 60, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("summed") == 2
    assert "NCCL is not used: rank 0: libnccl.so.2: cannot open shared object file" in done.stderr, done.stderr


@pytest.mark.parametrize(("fails", "told"), [("ncclAllReduce", "ncclAllReduce"), ("later", "all-reduce")])
def test_a_rank_whose_nccl_fails_leaves_the_others_free(fails: str, told: str, stand_in_nccl: dict[str, str]) -> None:
    """Their devices wait for it already, or are through."""
    script = (
        SUMS.format(before="import ctypes, time")
        + f"""
if collective.rank() == 1:
    os.environ["STAND_IN_NCCL_FAIL"] = "{fails}"
begin = time.monotonic()
try:
    collective.allreduce(x, collective.Sum)
    collective.barrier()
except collective.CollectiveError as error:
    print(f"rank {{collective.rank()}}: {{error}}")
    if collective.rank() == 1:
        assert time.monotonic() - begin < 2
deadline = time.monotonic() + 20
while ctypes.CDLL("libnccl.so.2").standInNcclUnderWay() > 0:
    assert time.monotonic() < deadline
    time.sleep(0.05)
print("free")
"""
    )
    done = run_ranks(2, ["-c", script], 60, env={**stand_in_nccl, "COLLECTIVE_TIMEOUT": "4"})
    cause = f"allreduce 'allreduce.unnamed.3': NCCL: {told}: the stand-in's error"
    assert f"rank 1: {cause}" in done.stdout, done.stdout + done.stderr
    assert re.search(f"rank 0: .*the engine of rank 1 has stopped: {cause}", done.stdout), done.stdout + done.stderr
    assert done.stdout.count("free") == 2, done.stdout + done.stderr


def test_nccl_on_some_ranks(stand_in_nccl: dict[str, str]) -> None:
    """One rank's setting is not enough."""
    script = "import os\nfrom mpi4py import MPI\nif MPI.COMM_WORLD.rank == 1: os.environ['COLLECTIVE_NCCL'] = '0'\n"
    done = run_ranks(2, ["-c", script + SUMS.format(before="")], 60, env=stand_in_nccl)
    assert done.stdout.count("summed") == 2, done.stdout + done.stderr
    assert done.stderr.count("NCCL is not used: COLLECTIVE_NCCL=1 is not set on all ranks") == 1, done.stderr


@pytest.mark.parametrize(
    ("refused", "told", "chosen"),
    [
        ("cuIpcOpenMemHandle_v2", "cuIpcOpenMemHandle: CUDA_ERROR (801)", "100003 or buckets or optimizer or join"),
        ("cuIpcGetMemHandle", "cuIpcGetMemHandle: CUDA_ERROR (801)", "float32-100003 or buckets"),
        ("cuModuleLoadData", "cuModuleLoadData: CUDA_ERROR (801)", "float32-100003 or buckets"),
    ],
)
def test_devices_that_cannot_share_go_by_way_of_the_host(
    refused: str, told: str, chosen: str, stand_in: dict[str, str]
) -> None:
    arguments = [*CASES, "-k", f"memory and ({chosen})", "-s"]
    done = run_ranks(2, arguments, 120, env={**stand_in, "STAND_IN_CUDA_REFUSE": refused})
    assert done.returncode == 0, done.stdout + done.stderr
    warning = f"arrays on devices are reduced by way of the host, which is slower: rank 0: CUDA device 0: {told}"
    assert (done.stdout + done.stderr).count(warning) == 1, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_cases_on_a_device(size: int) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    if not has_device():
        pytest.skip("no CUDA device")
    done = run_ranks(size, CASES, 300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.slow
def test_cases_with_nccl_on_devices() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    if not has_device(2):
        pytest.skip("no two CUDA devices")
    own = "import os; from mpi4py import MPI; os.environ['CUDA_VISIBLE_DEVICES'] = str(MPI.COMM_WORLD.rank); "
    cases = own + "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = run_ranks(2, ["-c", cases, *CASES[2:], "-k", "memory"], 300, env={"COLLECTIVE_NCCL": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_heat_example(tmp_path: Path) -> None:
    """Its arithmetic, with NumPy in the place of CuPy."""
    (tmp_path / "cupy.py").write_text(
        "from types import SimpleNamespace\nfrom numpy import *\n"
        "ndarray = type('none of these', (), {})\n"
        "runtime = SimpleNamespace(getDeviceCount=lambda: 1)\n"
        "cuda = SimpleNamespace(runtime=runtime, Device=lambda number: SimpleNamespace(use=lambda: None))\n"
    )
    script = HERE.parent / "examples" / "cupy_heat.py"
    told = []
    for size, points in ((1, 600), (2, 300), (3, 200)):
        done = run_ranks(size, [script, "--points", str(points)], 60, env={"PYTHONPATH": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert told[0].count("heat") == 4
    assert told[0] == told[1] == told[2]


def test_messages_need_no_shared_memory_of_devices(stand_in: dict[str, str]) -> None:
    arguments = [*CASES, "-k", "messages and (100003 or buckets)"]
    settings = {**AWARE, "STAND_IN_CUDA_REFUSE": "cuIpcGetMemHandle"}
    done = run_ranks(2, arguments, 120, env={**stand_in, **settings})
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_rank_without_memory_on_its_device(stand_in: dict[str, str]) -> None:
    """All ranks then take the way by the host."""
    script = """
import os, cupy, numpy as np
import collective
collective.init()
x = cupy.asarray(np.full(100_000, collective.rank() + 1.0, "float32"))
if collective.rank() == 1:
    os.environ["STAND_IN_CUDA_REFUSE"] = "cuMemAlloc_v2"
for _ in range(3):
    collective.allreduce_(x, collective.Sum, prescale_factor=0.5)
    assert (x.get() == x.get()[0]).all()
print(collective.rank(), x.get()[0])
"""
    for settings in ({}, {**AWARE, "COLLECTIVE_SHARED_MEMORY": "0"}):
        done = run_ranks(2, ["-c", script], 60, env={**stand_in, **settings})
        assert done.returncode == 0, done.stdout + done.stderr
        assert sorted(done.stdout.split()) == ["0", "1", "1.5", "1.5"]
        assert "arrays on devices are reduced by way of the host" in done.stderr
        assert "rank 1: CUDA device 0: cuMemAlloc of" in done.stderr


def test_info_shows_the_devices(stand_in: dict[str, str]) -> None:
    done = run_ranks(3, ["-m", "collective.info"], 60, env=stand_in)
    assert done.returncode == 0, done.stderr
    assert "devices   0 stand-in 0, 1 stand-in 1" in done.stdout
    assert "fewer than ranks: ranks 0, 2 share with others" in done.stdout
    assert "memory    shared by all ranks" in done.stdout
    assert "arrays on devices are reduced by the devices, in memory that they share" in done.stdout
    lines = done.stdout.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("rank  host"))
    assert [line.split()[-3:] for line in lines[header + 1 : header + 4]] == [
        [str(rank % 2), "(stand-in", f"{rank % 2})"] for rank in range(3)
    ]


def test_a_device_that_fails_ends_the_job_in_its_words(stand_in: dict[str, str]) -> None:
    script = """
import cupy, numpy as np
import collective
collective.init()
x = cupy.asarray(np.ones(1000))
for _ in range(10):
    collective.allreduce(x, collective.Sum)
"""
    env = {**stand_in, "STAND_IN_CUDA_FAIL": "cuMemcpyAsync:5"}
    done = run_ranks(2, ["-c", script], 60, env=env)
    assert done.returncode != 0
    assert "CUDA device 0: cuMemcpyAsync: CUDA_ERROR_ILLEGAL_ADDRESS (700)" in done.stderr, done.stderr


def test_a_receive_is_not_lost_when_the_sender_leaves(stand_in: dict[str, str]) -> None:
    """It has come to the host, and waits for a slow stream of the receiver's."""
    script = """
import cupy, numpy as np
import collective
collective.init()
x = cupy.asarray(np.arange(1000.0) * (1 - collective.rank()))
if collective.rank() == 0:
    collective.send(x, 1)
else:
    for _ in range(200):
        x.set(np.zeros(1000))
    collective.recv(x, 0)
    assert (x.get() == np.arange(1000.0)).all()
    print("received")
"""
    done = run_ranks(2, ["-c", script], 60, env=stand_in)
    assert done.returncode == 0, done.stderr
    assert "received" in done.stdout


@pytest.mark.slow
def test_the_doctor_looks_at_devices(stand_in: dict[str, str], tmp_path: Path) -> None:
    """On the stand-ins: who uses which, the kernels, and what two ranks with device memory have come to."""
    file = tmp_path / "found.json"
    done = run_ranks(3, ["-m", "collective.doctor", "--json", str(file)], 120, env=stand_in)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [f["text"] for f in json.loads(file.read_text())["findings"] if f["check"] == "devices"]
    assert "stand-in 0, 1 stand-in 1; ranks 0, 2 share one" in told[0]
    assert told[1].startswith("kernels are compiled by NVRTC")
    assert told[2].startswith("CUDA-aware MPI: no")


def test_what_is_missing_is_said(stand_in: dict[str, str]) -> None:
    """No driver, no device, or fewer of them."""
    script = """
import cupy, numpy as np
import collective
collective.init()
x = cupy.asarray(np.ones(10))
x.device.id = 5
try:
    collective.allreduce(x)
except collective.InvalidArgumentError as error:
    print(error)
"""
    done = run_ranks(1, ["-c", script], 60, env=stand_in)
    assert "no CUDA device 5: there are 2 (see CUDA_VISIBLE_DEVICES)" in done.stdout, done.stdout + done.stderr


def test_the_stand_in_is_found_only_by_those_who_ask_for_it(tmp_path: Path) -> None:
    """pytest puts the folder of a test file on the path: in that of the cases there must be nothing called cupy."""
    (tmp_path / "cupy.py").write_text("raise SystemExit('the real one')")
    done = run_ranks(1, [*CASES, "--collect-only"], 60, env={"PYTHONPATH": str(tmp_path)})
    assert "the real one" in done.stdout + done.stderr
