"""Horovod's module names, for scripts that are not to be changed: `python -m collective.horovod train.py`.

`install()` puts a finder in front of Python's own: from then on `import horovod`, `horovod.torch` and what is below it
give this package's modules. Nothing of that name is installed on the disk; where Horovod itself is, it is not used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

from .. import __version__
from ..running import run

__all__ = ["__version__", "install", "run"]

# Horovod's module, and which of ours it is.
_MODULES = {
    "horovod": "collective.horovod",
    "horovod.common": "collective.horovod.common",
    "horovod.common.basics": "collective.horovod.common.basics",
    "horovod.common.exceptions": "collective.horovod.common.exceptions",
    "horovod.common.process_sets": "collective.process_sets",
    "horovod.common.util": "collective.horovod.common.util",
    "horovod.runner": "collective.running",
    "horovod.torch": "collective.torch",
    "horovod.torch.compression": "collective.torch.compression",
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
    "horovod.torch.elastic": "elastic training is not supported",
}


class _Loader(importlib.abc.Loader):
    """Gives a module that exists under another name."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # The import system returns what stands there afterwards.
        sys.modules[module.__name__] = importlib.import_module(_MODULES[module.__name__])


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "horovod":
            return None
        if fullname in _MODULES:
            return importlib.machinery.ModuleSpec(fullname, _Loader())
        why = next(
            (why for name, why in _WHY_NOT.items() if f"{fullname}.".startswith(f"{name}.")), "it has no such module"
        )
        raise ModuleNotFoundError(
            f"No module named {fullname!r} in collective's Horovod interface: {why}", name=fullname
        )


def install() -> None:
    """Serve `import horovod` from this package, in this process; before anything has imported Horovod itself."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if "horovod" in sys.modules:
        raise ImportError(
            f"horovod was imported before, from {getattr(sys.modules['horovod'], '__file__', 'elsewhere')}"
        )
    sys.meta_path.insert(0, _Finder())
