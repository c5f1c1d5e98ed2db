"""What to say when an MPI cannot be loaded: by the engine at import, or by mpi4py in init()."""

from __future__ import annotations

import importlib.machinery
import re
import shutil
from pathlib import Path
from types import ModuleType

from .errors import MPIMismatchError

__all__ = ["explain_missing_engine", "import_mpi"]


def import_mpi() -> ModuleType:
    """mpi4py.MPI. Raises MPIMismatchError if mpi4py does not find the MPI that it needs."""
    import mpi4py

    from . import _core  # if it cannot be imported, explain_missing_engine() still can be

    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # from its loader, and from its search for a library
        missing = _missing_libraries(str(error))
        mpirun = shutil.which("mpirun") or shutil.which("mpiexec")
        raise MPIMismatchError(
            f"mpi4py {mpi4py.__version__} cannot load an MPI: "
            f"{f'{missing} was not found' if missing else str(error).strip()}. The engine was built for "
            f"{_core.built_for_mpi()} and runs with {_core.running_mpi_path()}; the mpirun on PATH is "
            f"{Path(mpirun).resolve() if mpirun else 'none'}. Compile mpi4py for that MPI, its mpicc first on PATH: "
            f"pip install --force-reinstall --no-deps --no-cache-dir --no-binary=mpi4py mpi4py. Or load an MPI that "
            f"mpi4py knows (module load), and install this package for it."
        ) from None
    return MPI


def explain_missing_engine(package: Path, error: ImportError) -> str:
    """Why the extension module in the directory `package` could not be imported, and what to do."""
    if not any((package / f"_core{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        others = ", ".join(sorted(path.name for path in package.glob("_core*.so")))
        return (
            f"{package} has no compiled engine for this Python{f' (only {others})' if others else ''}. If it is a "
            f"source tree and the package is installed elsewhere, start Python from another directory, for it looks in "
            f"the current one first; else build the engine here: `make setup`, or `pip install -e .`."
        )
    missing = _missing_libraries(str(error))
    if not missing:
        return f"the compiled engine cannot be loaded: {error}. Install this package again (`make setup`)."
    return (
        f"the compiled engine cannot be loaded: {missing} was not found. Load the MPI that this package was "
        f"installed with (module load, or its library's directory in LD_LIBRARY_PATH), or install this package again "
        f"with the mpicxx of the MPI that is to be used first on PATH."
    )


def _missing_libraries(text: str) -> str:
    """The libraries that a loader's messages name as missing, without their directories."""
    names = re.findall(r"([^/\s]+\.so[.\d]*): cannot open shared object file", text)
    return " or ".join(dict.fromkeys(names))
