"""What the package imports is what pyproject.toml declares: by itself, or as an extra for the parts that need it."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Packages that are called otherwise than what they hold.
PACKAGES = {
    "cupy": {"cupy-cuda12x", "cupy-cuda13x"},
    "cupyx": {"cupy-cuda12x", "cupy-cuda13x"},
    "yaml": {"pyyaml"},
}
# Folders and modules that need an extra from the start.
PARTS = {"torch": "torch", "bench": "bench", "predict": "bench", "cli/top_table.py": "top", "metrics.py": "metrics"}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements}


def foreign(node: ast.AST) -> Iterator[str]:
    """What an import statement takes from elsewhere than Python and this package."""
    modules: list[str] = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        modules = [node.module or ""]
    for module in modules:
        top = module.split(".")[0]
        if top not in sys.stdlib_module_names and top != "collective":
            yield top


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes below, without what is for type checkers alone: they know typing_extensions without its package."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield node
            yield from executed(node)


def declared(module: str, packages: set[str]) -> bool:
    return PACKAGES.get(module, {module}) <= packages


def test_every_import_is_declared() -> None:
    always = names(PROJECT["dependencies"])
    extras = {extra: names(requirements) for extra, requirements in PROJECT["optional-dependencies"].items()}
    used: set[str] = set()
    for path in (ROOT / "collective").rglob("*.py"):
        tree = ast.parse(path.read_text())
        inside = path.relative_to(ROOT / "collective")
        part = inside.parts[0]
        at_import = (
            always
            | extras.get(PARTS.get(str(inside), PARTS.get(part, "")), set())
            | ({"torch"} if part in ("bench", "predict") else set())
        )
        for node in tree.body:
            for module in foreign(node):
                assert declared(module, at_import), f"{path} imports {module}"
        for node in executed(tree):
            for module in foreign(node):
                assert declared(module, always.union(*extras.values())), f"{path} imports {module} somewhere"
                used |= PACKAGES.get(module, {module})
    assert always <= used  # and nothing is asked for in vain
