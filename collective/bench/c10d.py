"""torch.distributed on the ranks that MPI started: gloo, and a group of this package's backend."""

from __future__ import annotations

import os
from typing import Any

from .. import addresses
from .job import Job, has_torch

__all__ = ["connect", "disconnect", "group_of_ours"]

_connected = False
_ours: Any = None


def connect(job: Job) -> bool:
    """Initialise gloo unless that is done; collective. False, with a note, if that cannot be done."""
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
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    found = addresses.find(job.comm, job.local_size)
    if found is None:
        job.note("gloo is left out: not every node reaches an IPv4 address of rank 0's")
        return False
    # It would look up the host's name, which may lead nowhere, or only to this host.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", found.interface)
    if job.rank == 0:
        store = TCPStore(found.address, 0, job.size, is_master=True, wait_for_workers=False)
        job.comm.bcast(store.port)
    else:
        store = TCPStore(found.address, job.comm.bcast(None), job.size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=job.rank, world_size=job.size)
    _connected = True
    return True


def group_of_ours(job: Job) -> Any:
    """All ranks as a group of the backend "collective", beside gloo's; collective. None, with a note, without gloo."""
    global _ours
    if _ours is None and connect(job):
        import torch.distributed as dist

        from ..torch.distributed import register

        register()
        _ours = dist.new_group(backend="collective")
    return _ours


def disconnect() -> None:
    """End what `connect` began; collective."""
    global _connected, _ours
    _ours = None
    if _connected:
        import torch.distributed as dist

        _connected = False
        dist.destroy_process_group()
