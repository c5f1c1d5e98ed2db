"""Equal states at the start: parameters and optimizer state from one rank to all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import ops, runtime
from ..errors import CollectiveError, InvalidArgumentError
from ..objects import broadcast_object

__all__ = ["broadcast_optimizer_state", "broadcast_parameters"]


def broadcast_parameters(
    params: Mapping[str, Any] | Iterable[tuple[str, torch.Tensor]] | Iterable[torch.Tensor], root_rank: int = 0
) -> None:
    """Overwrite tensors with those of one rank.

    Args:
        params: `model.state_dict()`, `model.named_parameters()` or `model.parameters()`: the same names (or order),
            shapes and dtypes on all ranks. Entries that are no tensors are left alone.
        root_rank: the rank whose values all ranks get.
    """
    if isinstance(params, Mapping):
        items: list[Any] = sorted(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, torch.Tensor):
        items = list(params)
    else:
        raise InvalidArgumentError(f"broadcast_parameters takes a state_dict or parameters, not {type(params)}")
    tensors = []
    for number, item in enumerate(items):
        name, tensor = item if isinstance(item, tuple) else (str(number), item)
        if isinstance(tensor, torch.Tensor):
            tensors.append((name, tensor))
    _broadcast_tensors(tensors, root_rank, "broadcast_parameters")


def _broadcast_tensors(tensors: list[tuple[str, torch.Tensor]], root_rank: int, label: str) -> None:
    """Broadcast in place; non-contiguous tensors go through a copy."""
    handles = []
    with torch.no_grad():
        for name, tensor in tensors:
            target = tensor.detach()
            buffer = target if target.is_contiguous() else target.contiguous()
            handles.append((target, buffer, ops.broadcast_async_(buffer, root_rank, name=f"{label}.{name}")))
        errors = []
        for target, buffer, handle in handles:
            try:
                handle.wait()
            except CollectiveError as error:  # told when nothing is in flight any more
                errors.append(error)
                continue
            if buffer is not target:
                target.copy_(buffer)
    if errors:
        raise errors[0]


@dataclass
class _TensorAt:
    """In a skeleton of a state: here was a tensor."""

    index: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def _take_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The skeleton of nested dicts, lists and tuples; their tensors go to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _TensorAt(
            len(tensors) - 1, tuple(value.shape), torch.empty_like(value, device="meta").stride(), value.dtype
        )
    if isinstance(value, dict):
        return {key: _take_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take_tensors(item, tensors) for item in value)
    return value


def _put_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, _TensorAt):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_put_tensors(item, tensors) for item in value)
    return value


def _find_shapes(value: Any, found: dict[int, _TensorAt]) -> None:
    if isinstance(value, _TensorAt):
        found[value.index] = value
    elif isinstance(value, dict):
        for item in value.values():
            _find_shapes(item, found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _find_shapes(item, found)


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int = 0) -> None:
    """Give every rank the optimizer state of one: options such as the learning rate, and all per-parameter state.

    The root's optimizer is not changed in any way, and the other ranks need no state beforehand. The optimizers are
    of one class and have the same parameters in the same groups on all ranks.
    """
    tensors: list[torch.Tensor] = []
    is_root = runtime.rank() == root_rank
    skeleton = _take_tensors(optimizer.state_dict(), tensors) if is_root else None
    skeleton = broadcast_object(skeleton, root_rank)
    if not is_root:
        found: dict[int, _TensorAt] = {}
        _find_shapes(skeleton, found)
        places = [found[i] for i in range(len(found))]
        tensors = [torch.empty_strided(place.shape, place.strides, dtype=place.dtype) for place in places]
    _broadcast_tensors([(str(i), tensor) for i, tensor in enumerate(tensors)], root_rank, "broadcast_optimizer_state")
    if not is_root:
        optimizer.load_state_dict(_put_tensors(skeleton, tensors))
