"""The examples in a short form, on real ranks: they learn, agree bit for bit, resume as if never stopped."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from harness.mpirun import run_ranks

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.*"))


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


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
    assert re.match(rf"# (mpirun -np 2 .*python|sbatch .*) examples/{script.name}", first)


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
