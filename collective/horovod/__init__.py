"""Horovod's module names, for scripts to be run unchanged: `python -m collective.horovod train.py`.

`install()` puts a finder in front of Python's own: from then on `import horovod`, `horovod.torch` and the modules
below it give this package's modules. Nothing of that name is installed; Horovod itself, if installed, is not used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ..running import run

__all__ = ["install"]

_VERSION = "0.28.1"  # the release of Horovod whose interface this is: scripts decide by it what they can use

# Real modules, so that `from horovod import torch` looks for horovod.torch.
_PACKAGES = ("horovod", "horovod.common")

# Horovod's modules, and which of ours they are.
_MODULES = {
    "horovod.common.basics": "collective.horovod.common.basics",
    "horovod.common.exceptions": "collective.horovod.common.exceptions",
    "horovod.common.process_sets": "collective.horovod.common.process_sets",
    "horovod.common.util": "collective.horovod.common.util",
    "horovod.runner": "collective.running",
    "horovod.torch": "collective.torch",
    "horovod.torch.compression": "collective.torch.compression",
    "horovod.torch.elastic": "collective.torch.elastic",
    "horovod.torch.functions": "collective.torch.functions",
    "horovod.torch.mpi_ops": "collective.torch.mpi_ops",
    "horovod.torch.optimizer": "collective.torch.optimizer",
    "horovod.torch.sync_batch_norm": "collective.torch.sync_batch_norm",
}
_WHY_NOT = {
    "horovod.tensorflow": "TensorFlow is not supported",
    "horovod.keras": "Keras is not supported",
    "horovod.mxnet": "MXNet is not supported",
    "horovod.spark": "Spark is not supported: start the ranks with mpirun or srun",
    "horovod.ray": "Ray is not supported: start the ranks with mpirun or srun",
}

# Holds a package `horovod` that calls install(). Fresh processes of multiprocessing (spawn, forkserver) import the
# script again, and all they inherit of what install() did in their parent is sys.path.
_FOR_CHILDREN = str(Path(__file__).with_name("for_children"))


class _Loader(importlib.abc.Loader):
    """Provides one of the packages, or a module that exists under another name."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ in _MODULES:
            # The import system returns what is there afterwards.
            sys.modules[module.__name__] = importlib.import_module(_MODULES[module.__name__])
        elif module.__name__ == "horovod":
            vars(module).update(__version__=_VERSION, run=run)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "horovod":
            return None
        if fullname in _MODULES or fullname in _PACKAGES:
            return importlib.machinery.ModuleSpec(fullname, _Loader(), is_package=fullname in _PACKAGES)
        why = next((why for name, why in _WHY_NOT.items() if f"{fullname}.".startswith(f"{name}.")), None)
        message = f"No module named {fullname!r} in collective's Horovod interface: {why or 'it has no such module'}"
        # For a ModuleNotFoundError, `from horovod import keras` would substitute a message of its own.
        raise ImportError(message, name=fullname) if why else ModuleNotFoundError(message, name=fullname)


def install() -> None:
    """Serve `import horovod` from this package, in this process and in those that multiprocessing starts from it.

    Raises ImportError if something has already imported Horovod itself. A second call changes nothing.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if "horovod" in sys.modules:
        raise ImportError(
            f"horovod was imported before, from {getattr(sys.modules['horovod'], '__file__', 'elsewhere')}"
        )
    sys.meta_path.insert(0, _Finder())
    sys.path.insert(1, _FOR_CHILDREN)  # behind the script's directory, before what is installed
