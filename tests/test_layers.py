"""Who may know of whom, read from the sources: docs/architecture.md has the drawing."""

import ast
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
FOLDERS = ["base", "reduce", "messages", "node", "nodes", "device", "engine"]  # each may include those before it
PACKAGE = ROOT / "collective"
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


# ---- the modules of collective/ ----


def modules() -> dict[str, Path]:
    """Every module by its full name, the engine by its stub; without the tools that stand on top of all."""
    found = {}
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not name.startswith(("collective.bench", "collective.predict")):
            found[name] = path
    assert len(found) > 40
    return found


def imports(name: str, known: dict[str, Path]) -> set[str]:
    """The modules among those known that this one imports anywhere, within its functions and for type checkers too.

    Importing a module runs the packages that it lies in, which is left out: else each would import itself.
    """
    package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                module = f"{source}.{alias.name}"
                found.add(module if module in known else source)
    return found & known.keys()


def test_no_module_imports_itself_however_indirectly() -> None:
    known = modules()
    graph = {name: imports(name, known) for name in known}
    assert "collective.submission" in graph["collective.reductions"]  # it is read
    assert "collective.timeline" in graph["collective.lifecycle"]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" is imported by ".join(error.args[1])) from None


def test_torch_stands_on_the_rest() -> None:
    known = modules()
    for name in known:
        ours = {other for other in imports(name, known) if f"{other}.".startswith("collective.torch.")}
        assert name.startswith("collective.torch") or not ours, f"{name} imports {ours}"


def test_only_the_entrance_knows_the_life_cycle() -> None:
    """What runs operations does not start or end the runtime."""
    known = modules()
    users = {name for name in known if "collective.lifecycle" in imports(name, known)}
    entrances = {"collective", "collective.info", "collective.torch", "collective.torch.mpi_ops"}
    entrances |= {"collective.doctor.start"}
    # torch.distributed's own entrance: init_process_group() is init().
    entrances |= {f"collective.torch.distributed.{name}" for name in ("creation", "environment", "registration")}
    assert users - entrances == {"collective.horovod.common.basics", "collective.horovod.common.process_sets"}
