"""torch.distributed on the ranks that MPI started: gloo, and a group of this package's backend."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidArgumentError
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
    from ..torch.distributed import distributed_environment

    try:
        distributed_environment()
    except InvalidArgumentError as error:  # on all ranks
        job.note(f"gloo is left out: {error}")
        return False
    dist.init_process_group("gloo")
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
