"""What a process finds about itself and its machine, without MPI and without the runtime.

Facts are of plain types, since they travel between ranks whose versions of this package may differ.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import socket
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import unquote, urlparse

from .. import _core, info, kernels, mpi, version
from ..config import environment_outside_the_job, launched, launcher_variables, visible_devices
from . import host

__all__ = ["Facts", "collect"]

_SETTINGS = re.compile(r"(COLLECTIVE|HOROVOD)_")
_TRANSPORT = re.compile(r"LD_PRELOAD$|(OMPI_MCA|PRTE_MCA|PMIX_MCA|UCX|FI|MPIR_CVAR|I_MPI|MPICH|MV2)_|HCOLL_|NCCL_")
_MALLOC = re.compile(r"MALLOC_|GLIBC_TUNABLES$|LD_PRELOAD$")


class Facts(TypedDict, total=False):
    """One that could not be found out is missing, and `errors` has its name; the last ones are those of `start`."""

    errors: dict[str, str]
    host: str
    versions: dict[str, str]
    mpi: dict[str, str]  # the engine's: name, path, built for; another version
    launcher: dict[str, Any] | None  # name, variable, value, ranks; None where no launcher tells of several
    process_management: str
    settings: dict[str, str]
    transports: dict[str, str]
    malloc: dict[str, str]
    threads: str  # OMP_NUM_THREADS; "" for unset
    cores: list[int]  # that it may use
    cores_there: int
    load: float  # the average of a minute, before this job
    quota: float  # of a control group, in cores; 0 for none
    limits: dict[str, int]  # -1 for none
    memory: dict[str, int]
    shm: dict[str, int]
    huge_pages: str
    rdma: list[str]
    devices: list[str]  # what tells one from another
    device_names: list[str]
    no_devices: str
    visible_devices: str  # "all" where the variable is not set
    kernels: str  # why there are none; "" for all is well
    cupy: str
    packages: list[str]  # the package in use, and others of its name that Python would have found
    # Of MPI and the runtime:
    mpi4py_mpi: str
    thread_level: str
    node: int  # the first rank of this node
    shared_memory: str  # why its memory is not shared; "" if it is
    warnings: list[str]  # of init()


def collect() -> Facts:
    """The facts of this process."""
    facts: Facts = {"errors": {}}
    for name, find in _FINDERS.items():
        try:
            facts[name] = find()  # type: ignore[literal-required]
        except Exception as error:  # whatever a broken installation or a strange machine raises is what is looked for
            facts["errors"][name] = f"{type(error).__name__}: {error}"
    return facts


def _versions() -> dict[str, str]:
    found = {"collective": version.__version__, "python": platform.python_version()}
    found |= {name: info.version_of(name) or "none" for name in ("numpy", "torch", "mpi4py")}
    return {**found, "machine": f"{sys.maxsize.bit_length() + 1}-bit {sys.byteorder}-endian"}


def _mpi() -> dict[str, str]:
    return {
        "name": info.mpi_name(),
        "path": _core.running_mpi_path(),
        "built_for": _core.built_for_mpi(),
        "other_version": mpi.other_version() or "",
    }


def _launcher() -> dict[str, Any] | None:
    found = launched()
    return None if found is None else vars(found)


def _process_management() -> str:
    """By what a launcher talks with this process: PMIx and its version, PMI; "" for nothing."""
    told = launcher_variables()
    if "PMIX_RANK" in told:
        return f"PMIx {told.get('PMIX_VERSION', '')}".strip()
    return next((name for prefix, name in (("PMI2_", "PMI-2"), ("PMI_", "PMI")) if _any(told, prefix)), "")


def _any(names: dict[str, str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _matching(pattern: re.Pattern[str]) -> dict[str, str]:
    return {name: value for name, value in sorted(environment_outside_the_job().items()) if pattern.match(name)}


def _limits() -> dict[str, int]:
    numbers = {"memlock": resource.RLIMIT_MEMLOCK, "nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    soft = {name: resource.getrlimit(number)[0] for name, number in numbers.items()}
    return {name: -1 if value == resource.RLIM_INFINITY else value for name, value in soft.items()}


def _kernels() -> str:
    if not _core.devices()[0]:
        return "no device"
    try:
        kernels.image(_core.compute_capability(0))
    except kernels.KernelsUnavailableError as error:
        return str(error)
    return ""


def _packages() -> list[str]:
    """The directory of this package; then those that sys.path and the installation have under the same name."""
    name = __name__.partition(".")[0]
    ours = Path(__file__).resolve().parents[1]
    found = [Path(entry or ".", name).resolve() for entry in sys.path]
    try:
        installed = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        pass  # a source tree
    else:
        # Where an editable installation leads to is no directory of sys.path.
        source = json.loads(installed.read_text("direct_url.json") or "{}")
        if source.get("dir_info", {}).get("editable"):
            found.append(Path(unquote(urlparse(source["url"]).path), name).resolve())
    others = [path for path in found if path != ours and (path / "__init__.py").is_file()]
    return [str(path) for path in dict.fromkeys([ours, *others])]


_FINDERS = {
    "host": socket.gethostname,
    "versions": _versions,
    "mpi": _mpi,
    "launcher": _launcher,
    "process_management": _process_management,
    "settings": lambda: _matching(_SETTINGS),
    "transports": lambda: _matching(_TRANSPORT),
    "malloc": lambda: _matching(_MALLOC),
    "threads": lambda: environment_outside_the_job().get("OMP_NUM_THREADS", ""),
    "cores": lambda: sorted(os.sched_getaffinity(0)),
    "cores_there": lambda: os.cpu_count() or 1,
    "load": lambda: os.getloadavg()[0],
    "quota": host.core_quota,
    "limits": _limits,
    "memory": host.memory,
    "shm": host.shm,
    "huge_pages": host.huge_pages,
    "rdma": host.rdma_devices,
    "devices": lambda: [identity for _, identity in _core.devices()[0]],
    "device_names": lambda: [name for name, _ in _core.devices()[0]],
    "no_devices": lambda: _core.devices()[1],
    "visible_devices": lambda: "all" if visible_devices() is None else visible_devices(),
    "kernels": _kernels,
    "cupy": lambda: info.version_of("cupy") or "none",
    "packages": _packages,
}
