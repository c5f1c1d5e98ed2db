"""Who may know of whom, read from the sources: docs/architecture.md has the drawing."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
FOLDERS = ["base", "reduce", "messages", "node", "device", "engine"]  # each may include those before it
KERNELS = "../../collective/kernels/launch.h"  # what kernels and their callers share


def includes(path: Path) -> list[str]:
    return re.findall(r'#include "([^"]+)"', path.read_text())


def sources(folder: str) -> list[Path]:
    found = [*(CSRC / folder).glob("*.h"), *(CSRC / folder).glob("*.cc")]
    assert found, folder
    return found


def reached(path: Path, seen: set[str]) -> set[str]:
    """Every header of ours that is included by this file, however indirectly."""
    for name in includes(path):
        if name != KERNELS and name not in seen:
            seen.add(name)
            reached(CSRC / name, seen)
    return seen


def test_folders_include_downwards_only() -> None:
    assert sorted(path.name for path in CSRC.iterdir() if path.is_dir()) == sorted(FOLDERS)
    for number, folder in enumerate(FOLDERS):
        for source in sources(folder):
            for name in includes(source):
                assert name == KERNELS or name.split("/")[0] in FOLDERS[: number + 1], f"{source} includes {name}"


def test_every_file_includes_what_exists() -> None:
    for folder in FOLDERS:
        for source in sources(folder):
            assert all((CSRC / name).exists() for name in reached(source, set())), source


def test_only_messages_see_mpi() -> None:
    for folder in FOLDERS:
        for source in sources(folder):
            assert folder == "messages" or "#include <mpi.h>" not in source.read_text(), source
    # What the algorithms need of MPI, a Comm, is in messages/. Those of a node need none of it.
    for folder in ("base", "reduce", "node"):
        for source in sources(folder):
            if source.stem != "shared_memory_creation":
                assert not any(name.startswith("messages/") for name in reached(source, set())), source
