"""torch.distributed's gloo on the ranks that MPI started."""

from __future__ import annotations

import os

from .job import Job, has_torch

__all__ = ["connect", "disconnect"]

_connected = False


def connect(job: Job) -> bool:
    """Initialise gloo unless that is done; collective. False, with a note, if this torch does not have it."""
    global _connected
    if _connected:
        return True
    if not has_torch():
        job.note("gloo is left out: torch is not installed")
        return False
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        job.note("gloo is left out: this torch was built without it")
        return False
    one_node = job.local_size == job.size
    if one_node:
        # It would look up the host's name, which in a container may lead nowhere.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    from mpi4py import MPI
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if job.rank == 0:
        host = "127.0.0.1" if one_node else MPI.Get_processor_name()
        store = TCPStore(host, 0, job.size, is_master=True, wait_for_workers=False)
        job.comm.bcast((host, store.port))
    else:
        host, port = job.comm.bcast(None)
        store = TCPStore(host, port, job.size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=job.rank, world_size=job.size)
    _connected = True
    return True


def disconnect() -> None:
    """End what `connect` began; collective."""
    global _connected
    if _connected:
        import torch.distributed as dist

        _connected = False
        dist.destroy_process_group()
