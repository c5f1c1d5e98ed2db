"""The examples in a short form, on real ranks: they learn, agree bit for bit, resume as if never stopped."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from harness.mpirun import run_ranks

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted([*EXAMPLES.glob("*.*"), *EXAMPLES.glob("slurm/*")])


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def needs_torch(major: int, minor: int) -> pytest.MarkDecorator:
    """Where the example's parts of torch.distributed are."""
    found = importlib.util.find_spec("torch") and importlib.metadata.version("torch")
    old = not found or tuple(int(part) for part in found.split(".")[:2]) < (major, minor)
    return pytest.mark.skipif(old, reason=f"needs torch {major}.{minor}, not {found}")


def run(size: int, script: str, *options: str | Path, timeout: float = 150) -> list[str]:
    """The lines that the example prints."""
    done = run_ranks(size, [EXAMPLES / script, *options], timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def number(pattern: str, line: str) -> float:
    """What the pattern's group matches in the line."""
    match = re.search(pattern, line)
    assert match, f"no {pattern!r} in {line!r}"
    return float(match[1])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_is_short_and_begins_with_its_command(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert len(lines) <= 100
    first = next(line for line in lines if not line.startswith("#!"))
    assert re.match(rf"# (mpirun -np 2 .*python|sbatch .*) examples/{script.relative_to(EXAMPLES)}", first)


@needs("torch", "sklearn")
@pytest.mark.parametrize(
    ("size", "options", "epochs"),
    [
        (2, [], 20),  # the command of README.md
        (2, ["--epochs", "10", "--compression", "fp16"], 10),
        (3, ["--epochs", "10", "--compression", "bf16"], 10),
    ],
)
def test_digits_are_learned(size: int, options: list[str], epochs: int) -> None:
    lines = run(size, "train_digits.py", *options)
    assert [line.partition(":")[0] for line in lines[:-2]] == [f"epoch {n + 1} of {epochs}" for n in range(epochs)]
    assert f"parameters bitwise equal on {size} of {size} ranks" in lines[-2]
    assert number(r"^test accuracy (\S+) %", lines[-1]) >= 97
    assert number(r"(\S+) samples/s", lines[-1]) > 0


@needs("torch")
def test_gpt_learns(tmp_path: Path) -> None:
    lines = run(2, "train_gpt.py", "--steps", "100", "--checkpoint", tmp_path / "gpt.pt")
    losses = [number(r"validation loss (\S+)", line) for line in lines]
    assert [number(r"^step (\d+)", line) for line in lines] == [1, 50, 100]
    assert losses[0] > 5.2  # nats: knowing nothing is log(256) = 5.545
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 2.9
    assert [file.name for file in tmp_path.iterdir()] == ["gpt.pt"]


@needs("torch")
def test_gpt_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    def trained(name: str, *options: str) -> tuple[float, list[tuple[str, Any]]]:
        """The loss at the end, and every value of the checkpoint."""
        import torch

        checkpoint = tmp_path / name
        lines = run(3, "train_gpt.py", "--checkpoint", checkpoint, *options)
        return number(r"validation loss (\S+)", lines[-1]), flatten(torch.load(checkpoint))

    loss, whole = trained("whole.pt", "--steps", "6")
    early, half = trained("stopped.pt", "--steps", "3")
    assert early > loss
    assert not same(half, whole)
    resumed, values = trained("stopped.pt", "--steps", "6", "--resume")
    assert resumed == loss
    assert same(values, whole)


@needs("torch")
def test_gpt_without_the_checkpoint_ends_all_ranks(tmp_path: Path) -> None:
    done = run_ranks(2, [EXAMPLES / "train_gpt.py", "--resume", "--checkpoint", tmp_path / "none.pt"], 60)
    assert done.returncode != 0
    assert "FileNotFoundError" in done.stderr


@needs_torch(2, 6)
@needs("torch", "sklearn")
@pytest.mark.parametrize(("size", "options", "epochs"), [(2, [], 20), (3, ["--epochs", "10"], 10)])
def test_ddp_learns_the_digits(size: int, options: list[str], epochs: int) -> None:
    lines = run(size, "ddp_digits.py", *options)
    assert [line.partition(":")[0] for line in lines[:-2]] == [f"epoch {n + 1} of {epochs}" for n in range(epochs)]
    assert f"parameters bitwise equal on {size} of {size} ranks" in lines[-2]
    assert number(r"^test accuracy (\S+) %", lines[-1]) >= 97


@needs_torch(2, 6)
def test_fsdp_trains_and_resumes_as_one_process(tmp_path: Path) -> None:
    def trained(size: int, name: str, *options: str) -> list[float]:
        lines = run(size, "fsdp_gpt.py", "--checkpoint", tmp_path / name, *options)
        return [number(r"loss (\S+) nats/byte", line) for line in lines]

    first, last = trained(1, "one", "--steps", "6")
    assert last < first
    assert trained(2, "whole", "--steps", "6") == pytest.approx([first, last], abs=1e-9)
    early = trained(4, "stopped", "--steps", "3")[-1]
    assert last < early < first
    assert trained(3, "stopped", "--steps", "6", "--resume") == pytest.approx([last], abs=1e-9)  # one rank fewer


@needs_torch(2, 6)
@pytest.mark.parametrize(
    ("size", "script", "options"),
    [
        (2, "tensor_parallel.py", []),
        (3, "tensor_parallel.py", ["--hidden", "16"]),  # 6, 6 and 4 of them
        (2, "pipeline_gpt.py", ["--steps", "3"]),
        (4, "pipeline_gpt.py", ["--steps", "3", "--microbatches", "8"]),
        (2, "moe_alltoall.py", []),
        (3, "moe_alltoall.py", ["--experts", "1"]),
    ],
)
def test_parallel_equals_one_process(size: int, script: str, options: list[str]) -> None:
    line = run(size, script, *options)[-1]
    differences = re.findall(r"\d\.\de[-+]\d+", line)
    assert line.startswith("greatest difference to one process: ")
    assert differences
    assert all(float(difference) < 1e-9 for difference in differences), line


@pytest.mark.parametrize("size", [1, 2, 3])
def test_numpy_mean_is_that_of_the_whole(size: int) -> None:
    shares, result = run(size, "numpy_mean.py")
    counts = [int(count) for count in re.findall(r"\d+", shares.partition(",  ")[0].partition("longest")[0])]
    assert len(counts) == size
    assert number(r"of (\d+) lines", result) == sum(counts)
    assert 20 < number(r"^mean (\S+)", result) < 60


def flatten(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Paths and leaves of nested dicts and lists, in order."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in items for leaf in flatten(item, f"{path}/{key}")]
    return [(path, value)]


def same(left: list[tuple[str, Any]], right: list[tuple[str, Any]]) -> bool:
    """Whether paths are the same, and leaves bit for bit."""
    import torch

    if [path for path, _ in left] != [path for path, _ in right]:
        return False
    pairs = [(a, b) for (_, a), (_, b) in zip(left, right, strict=True)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
