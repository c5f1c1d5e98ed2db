"""Every block of the README and the docs that a reader may copy: it is run here, or it is said why not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpirun import environment, run_ranks

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# What stands before a Python block for it to run.
BEFORE = {
    "import collective.torch as hvd": "import torch\nNet = lambda: torch.nn.Linear(2, 1)\n",
    "import collective": "import numpy as np\nx = np.ones(3)\nrows = np.ones((2, 3))\n",
}
# Why a command is not run.
NOT_RUN = {
    "make train": "test_examples.py runs what it runs",
    "make test": "it is what runs this",
    "module load openmpi": "a cluster's command",
    "pip install --no-cache-dir --no-binary=mpi4py mpi4py": "needs the network; `make MPI=system` does it",
    'pip install ".[torch,examples]"': "needs the network; test_launcher.py installs without it",
    'eval "$(python -m collective.ucx)"': "needs libucx-cu13, which test_ucx.py stands in for",
}


def blocks(language: str) -> list[tuple[str, str]]:
    """The page and the text of each block."""
    found = []
    for page in PAGES:
        for text in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            found.append((page.name, text))
    return found


def commands() -> list[str]:
    lines = [line for _, text in blocks("console") for line in text.splitlines() if line.startswith("$ ")]
    return list(dict.fromkeys(re.sub(r"\s+# .*", "", line[2:]).strip() for line in lines))


def test_no_block_is_of_another_language() -> None:
    for page in PAGES:
        languages = set(re.findall(r"^```(\w+)$", page.read_text(), re.MULTILINE))
        assert languages <= {"console", "python", "diff"}, f"{page.name}: {languages}"


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python(page: str, text: str) -> None:
    before = BEFORE[re.sub(r"\s+# .*", "", text.splitlines()[0])]
    done = run_ranks(2, ["-c", before + text], 60)
    assert done.returncode == 0, f"{page}: {done.stderr}"


@pytest.mark.parametrize("command", commands())
def test_command(command: str) -> None:
    if command in NOT_RUN:
        return
    env = environment()
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
