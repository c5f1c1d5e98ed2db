"""The engine's tests without Python, in tests/csrc: kernels, shared memory, and the protocols of its counters."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.mpirun import environment, run_ranks

HERE = Path(__file__).parent / "csrc"
BUILD = HERE.parents[1] / "build" / "csrc"

pytestmark = pytest.mark.slow


def mpicxx() -> str:
    """As setup.py finds it."""
    beside = Path(sys.executable).with_name("mpicxx")
    found = os.environ.get("MPICXX") or (str(beside) if beside.exists() else shutil.which("mpicxx"))
    if found is None:
        pytest.skip("no mpicxx in $MPICXX, beside this Python or on PATH")
    return found


def build(name: str) -> Path:
    """The program, compiled where it is missing or old."""
    program = BUILD / name
    command = ["make", "-s", "-C", HERE, f"-j{os.cpu_count()}", f"MPICXX={mpicxx()}", f"BUILD={BUILD}", program]
    made = subprocess.run(command, capture_output=True, text=True, timeout=570, check=False)
    assert made.returncode == 0, made.stderr
    assert "warning:" not in made.stderr, made.stderr
    return program


@pytest.fixture(scope="module")
def thread_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    source = tmp_path_factory.mktemp("tsan") / "empty.cc"
    source.write_text("int main() {}")
    program = source.with_suffix("")
    compiler = [mpicxx(), "-fsanitize=thread", source, "-o", program]
    compiled = subprocess.run(compiler, capture_output=True, text=True, timeout=60, check=False)
    if compiled.returncode != 0:
        pytest.skip(f"the compiler has no thread sanitizer: {compiled.stderr}")
    ran = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    if ran.returncode != 0:  # for one, "unexpected memory mapping" with a kernel newer than the compiler
        pytest.skip(f"the thread sanitizer does not run here: {ran.stderr}")


def test_reduce_kernels_give_the_reference_bits_in_every_instruction_set() -> None:
    result = subprocess.run([build("test_reduce")], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checks passed" in result.stdout


def test_kernels_for_devices_give_the_bits_of_the_host() -> None:
    result = subprocess.run([build("test_kernels")], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checks passed" in result.stdout


def test_a_ledger_of_made_up_times() -> None:
    result = subprocess.run([build("test_ledger")], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checks passed" in result.stdout


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["test_mail", "test_node"])
def test_ranks_of_a_node_in_shared_memory(name: str, size: int) -> None:
    result = run_ranks(size, ["1"], program=build(name), timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{size} ranks: " in result.stdout


@pytest.mark.parametrize("name", ["test_agreement", "test_mail", "test_node"])
def test_threads_as_ranks_under_the_thread_sanitizer(name: str, thread_sanitizer: None) -> None:
    command = [build(f"{name}_tsan"), "threads", "3", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ThreadSanitizer" not in result.stderr, result.stderr
    assert "3 threads: " in result.stdout


# What the libraries of an MPI do is their business: their accesses are not looked at. And they are to leave the hooks
# of the memory to the sanitizers.
SANITIZED = {
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
    "ASAN_OPTIONS": "detect_leaks=0",
    "OMPI_MCA_memory": "^patcher",
    "OMPI_MCA_pml": "ob1",
    "PMIX_MCA_gds": "hash",
    "UCX_MEM_EVENTS": "no",
    "UCX_MEM_MMAP_HOOK_MODE": "none",
}


ENGINE_CHECKS = ["given up", "join", "kept", "order", "threads"]


def test_the_engine_under_the_thread_sanitizer(thread_sanitizer: None) -> None:
    result = run_ranks(2, ["1"], program=build("test_engine_tsan"), timeout=300, env=SANITIZED)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ThreadSanitizer" not in result.stderr, result.stderr
    assert sorted(re.findall(r"2 ranks: (.+) passed", result.stdout)) == ENGINE_CHECKS


def test_the_engine_under_the_address_and_undefined_behaviour_sanitizers() -> None:
    result = run_ranks(2, ["1"], program=build("test_engine_asan"), timeout=300, env=SANITIZED)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(re.findall(r"2 ranks: (.+) passed", result.stdout)) == ENGINE_CHECKS
