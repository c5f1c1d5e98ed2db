"""Groups with this backend for some kinds of devices and others of torch's backends for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d

from .callers import BACKEND, variable_of
from .compiling import leave_alone
from .process_group import ProcessGroup

__all__ = ["MixedProcessGroup", "other_backends"]

_OPERATIONS = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast"),
    *("_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter"),
    *("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"),
    *("_allgather_base", "all_gather_single", "allgather", "allgather_coalesced"),
    *("allgather_into_tensor_coalesced", "all_gather_single_coalesced"),
    *("gather", "scatter", "alltoall_base", "all_to_all_single", "alltoall"),
    *("send", "recv", "recv_anysource", "_start_coalescing", "_end_coalescing"),
)


def other_backends() -> dict[str, str]:
    """The backends that the user has named beside this one, by the kind of device: {"cuda": "nccl"}.

    torch makes them one by one, and takes a backend that is a whole ProcessGroup, as this one must be, for all kinds.
    """
    config = variable_of("_new_process_group_helper", "backend_config")
    every: Mapping[str, str] = {} if config is None else config.get_device_backend_map()
    return {device: str(name) for device, name in every.items() if str(name) != BACKEND}


class MixedProcessGroup(ProcessGroup):
    """Operations go where their tensors are: to this backend, or to a group of another one beside it.

    Args:
        rank, ranks, name, label, timeout: as of ProcessGroup.
        others: the other backends, by the kind of device.
        store: by which these find each other.
    """

    def __init__(
        self,
        rank: int,
        ranks: list[int],
        name: str,
        label: str,
        timeout: timedelta,
        others: Mapping[str, str],
        store: Any,
    ) -> None:
        super().__init__(rank, ranks, name, label, timeout)
        members = variable_of("_new_process_group_helper", "global_ranks_in_group")
        self._others: dict[str, Any] = {}
        for device, backend in others.items():
            self._others[device], _ = distributed_c10d._new_process_group_helper(
                *(len(ranks), rank, members, f"{device}:{backend}", store),
                f"{name}-{device}",  # type: ignore[arg-type]
                timeout=timeout,
            )

    @property
    def _device_types(self) -> list[torch.device]:
        own = [device for device in super()._device_types if device.type not in self._others]
        return own + [torch.device(kind) for kind in self._others]

    def _get_backend(self, device: torch.device) -> Any:
        other = self._others.get(torch.device(device).type)
        return self if other is None else other._get_backend(device)

    def barrier(self, opts: Any = None, *more: Any) -> Any:
        """By this backend, unless torch has chosen another one's device for it."""
        device = getattr(opts, "device", None)
        other = self._others.get(device.type) if device is not None else None
        return super().barrier(opts, *more) if other is None else other.barrier(opts, *more)

    def shutdown(self) -> None:
        super().shutdown()
        for other in self._others.values():
            other.shutdown()


def _kind_of_device(what: Any) -> str | None:
    """That of the first tensor or device in nested lists."""
    if isinstance(what, torch.Tensor):
        return what.device.type
    if isinstance(what, torch.device):
        return what.type
    if isinstance(what, list | tuple):
        return next((kind for part in what if (kind := _kind_of_device(part)) is not None), None)
    return None


def _dispatched(name: str) -> Callable[..., Any]:
    def operation(self: MixedProcessGroup, *args: Any, **options: Any) -> Any:
        other = self._others.get(_kind_of_device(args) or "")
        return getattr(super(MixedProcessGroup, self) if other is None else other, name)(*args, **options)

    operation.__name__ = name
    return operation


for _name in _OPERATIONS:
    setattr(MixedProcessGroup, _name, _dispatched(_name))
leave_alone(MixedProcessGroup)
