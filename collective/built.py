"""What this build can do, under Horovod's names. Each answer is the truth about this package, not about Horovod."""

from __future__ import annotations

from . import runtime

__all__ = [
    "ccl_built",
    "cuda_built",
    "ddl_built",
    "gloo_built",
    "gloo_enabled",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rocm_built",
]


def mpi_threads_supported() -> bool:
    """True: init() has ensured MPI_THREAD_MULTIPLE. Raises NotInitializedError before init()."""
    runtime.current()
    return True


def mpi_enabled() -> bool:
    """True: MPI is the only transport."""
    return True


def mpi_built() -> bool:
    """True: there is no build without MPI."""
    return True


def gloo_enabled() -> bool:
    """False: gloo is not used."""
    return False


def gloo_built() -> bool:
    """False: gloo is not used."""
    return False


def nccl_built() -> int:
    """0: nothing is built with NCCL; COLLECTIVE_NCCL=1 loads it. (Horovod returns NCCL's version number.)"""
    return 0


def ddl_built() -> bool:
    """False: IBM DDL is not used."""
    return False


def ccl_built() -> bool:
    """False: oneCCL is not used."""
    return False


def cuda_built() -> bool:
    """True: every build takes arrays on CUDA devices, given a driver (`python -m collective.info`)."""
    return True


def rocm_built() -> bool:
    """False: tensors live on the host or on CUDA devices."""
    return False
