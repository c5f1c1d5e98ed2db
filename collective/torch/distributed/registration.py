"""How torch.distributed learns of the backend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ... import lifecycle, runtime
from ...errors import InvalidArgumentError
from .callers import BACKEND, variable_of
from .environment import open_store

__all__ = ["register"]


def register() -> None:
    """Make `init_process_group("collective")` known to torch.distributed; a second call changes nothing.

    `import collective.torch` calls it, and so does torch 2.14 through the entry point `torch.distributed.backends`.
    """
    if not dist.is_available() or BACKEND in dist.Backend.backend_list:
        return
    from .creation import create

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])
    _answer_env()


def _answer_env() -> None:
    """Let `env://`, which init_process_group() assumes, take ranks and store from MPI for this backend.

    torch has no public way to say that a backend needs no variables in the environment; its own MPI backend is a
    special case in init_process_group().
    """
    from torch.distributed.rendezvous import _rendezvous_handlers as handlers

    ordinary = handlers["env"]

    def env(url: str, timeout: timedelta, **more: Any) -> Iterator[tuple[Any, int, int]]:
        if not _is_for_us():
            yield from ordinary(url, timeout=timeout, **more)
            return
        lifecycle.init()
        for name, value in (("RANK", runtime.rank()), ("WORLD_SIZE", runtime.size())):
            if os.environ.get(name, str(value)) != str(value):
                raise InvalidArgumentError(
                    f"{name}={os.environ[name]} in the environment of rank {runtime.rank()} of {runtime.size()}, which "
                    f"MPI started: unset it, or let collective.torch.distributed_environment() set it"
                )
        yield open_store(timeout), runtime.rank(), runtime.size()

    handlers["env"] = env


def _is_for_us() -> bool:
    """Whether the call of init_process_group() under way names this backend."""
    named = str(variable_of("init_process_group", "backend"))
    return BACKEND in (part.rpartition(":")[2] for part in named.split(","))
