"""Equal states at the start: parameters and optimizer state, sent from one rank to all."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import arrays, ops, runtime
from ..errors import CollectiveError, InvalidArgumentError
from ..objects import allgather_object, broadcast_object
from ..process_sets import ProcessSet, global_process_set

__all__ = ["broadcast_named", "broadcast_optimizer_state", "broadcast_parameters"]

Named = tuple[str, Any]  # a tensor, or a NumPy array


def broadcast_parameters(params: Mapping[str, Any] | Iterable[Any], root_rank: int = 0) -> None:
    """Overwrite tensors with those of one rank; collective.

    Args:
        params: `model.state_dict()`, `model.named_parameters()` or `model.parameters()`; also mappings and sequences
            of these, and of NumPy arrays. The same names (or order), shapes and dtypes on all ranks. Any dtype of fixed
            size is accepted; its elements travel as bytes if need be. None is skipped; numbers, strings and other
            objects cannot be overwritten: they are left alone, with one warning that names them.
        root_rank: the rank whose values all ranks get.

    Raises:
        InvalidArgumentError, UnsupportedTypeError: on every rank, before anything has moved, if one of them cannot take
            part: it passed a module, a sparse tensor, or one that has no memory of its own.
        MismatchError: names, shapes or dtypes differ between ranks.
    """
    error: Exception | None = None
    named: list[Named] = []
    try:
        named = _flat(params)
        pairs = [(name, *_target_and_buffer(name, tensor)) for name, tensor in named]
    except Exception as raised:  # from a tensor's own class, too: the others are about to wait
        error = raised
    _agree("broadcast_parameters", error)
    _broadcast(pairs, root_rank, "broadcast_parameters")


def _agree(label: str, error: Exception | None) -> None:
    """Raise on all ranks what is wrong on one of them; collective."""
    own = np.frombuffer(b"" if error is None else f"{error}\n".encode(), dtype=np.uint8)
    # Named, because ranks may have made different numbers of unnamed calls before.
    told = ops.allgather(own, name=f"{label}.errors")
    if error is not None:
        raise error
    if told.size > 0:
        raise InvalidArgumentError(f"{label}: another rank cannot take part: {told.tobytes().decode().splitlines()[0]}")


def _flat(params: Any) -> list[Named]:
    """The tensors and arrays in nested mappings and sequences, with names that are the same on all ranks."""
    named: list[Named] = []
    skipped: list[str] = []

    def take(name: str, value: Any) -> None:
        def inner(key: Any) -> str:
            return f"{name}.{key}" if name else str(key)

        if isinstance(value, (torch.Tensor, np.ndarray)):
            named.append((name, value))
        elif isinstance(value, torch.nn.Module):
            what = f"'{name}'" if name else "what it was given"
            raise InvalidArgumentError(
                f"rank {runtime.rank()}: broadcast_parameters: {what} is a {type(value).__qualname__}, a module: "
                f"pass its state_dict()"
            )
        elif isinstance(value, Mapping):
            for key, item in sorted(value.items(), key=lambda entry: str(entry[0])):
                take(inner(key), item)
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
                    take(inner(item[0]), item[1])
                else:
                    take(inner(number), item)
        elif value is not None:
            skipped.append(f"'{name}' ({type(value).__qualname__})")

    if not isinstance(params, (Mapping, torch.nn.Module)):
        if not isinstance(params, Iterable) or isinstance(params, (torch.Tensor, np.ndarray, str, bytes)):
            raise InvalidArgumentError(
                f"rank {runtime.rank()}: broadcast_parameters takes a state_dict or parameters, not a "
                f"{type(params).__qualname__}"
            )
        params = list(params)
    take("", params)
    if skipped:
        warnings.warn(
            f"broadcast_parameters left alone what is not a tensor: {', '.join(skipped[:6])}"
            + (f" and {len(skipped) - 6} more" if len(skipped) > 6 else "")
            + "; broadcast_object() sends such values",
            stacklevel=4,
        )
    return named


def _target_and_buffer(name: str, tensor: Any) -> tuple[Any, Any]:
    """What is to be overwritten, and a contiguous array with its elements: the same one if that is contiguous."""
    try:
        if isinstance(tensor, np.ndarray):
            if not tensor.flags.writeable:
                raise InvalidArgumentError("the array is not writeable")
            v = arrays.view(tensor, moves_only=True)
        else:
            tensor = tensor.detach()
            v = arrays.view(tensor, moves_only=True)
            if not v.contiguous and _overlaps(_once(tensor, tensor)):
                raise InvalidArgumentError("elements of the tensor overlap in memory")
        return tensor, arrays.contiguous(v).array
    except CollectiveError as error:
        raise type(error)(f"rank {runtime.rank()}: broadcast_parameters: '{name}': {error}") from None


def _once(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The part of a tensor in which no address of `like`, if that is expanded, comes twice."""
    for dim in range(like.dim()):
        if like.stride(dim) == 0 and like.size(dim) > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether several elements may share an address."""
    end = 1
    for stride, size in sorted((tensor.stride(d), tensor.size(d)) for d in range(tensor.dim()) if tensor.size(d) > 1):
        if stride < end:
            return True
        end = stride * (size - 1) + end
    return False


def broadcast_named(named: list[Named], root_rank: int, label: str, process_set: ProcessSet) -> None:
    """Overwrite tensors that all ranks are known to have by those of one rank. For this package's modules."""
    _broadcast([(name, *_target_and_buffer(name, tensor)) for name, tensor in named], root_rank, label, process_set)


def _broadcast(
    pairs: list[tuple[str, Any, Any]], root_rank: int, label: str, process_set: ProcessSet = global_process_set
) -> None:
    """Broadcast buffers in place, and copy them to their targets."""
    handles = []
    errors: list[CollectiveError] = []
    with torch.no_grad():
        for name, target, buffer in pairs:
            try:
                handle = ops.broadcast_async_(buffer, root_rank, name=f"{label}.{name}", process_set=process_set)
                handles.append((target, buffer, handle))
            except CollectiveError as error:
                errors.append(error)
        for target, buffer, handle in handles:
            try:
                handle.wait()
            except CollectiveError as error:  # raised when nothing is in flight any more
                errors.append(error)
                continue
            if buffer is target:
                continue
            if isinstance(target, np.ndarray):
                target[...] = buffer
            else:
                _once(target, target).copy_(_once(buffer, target))
    if errors:
        raise errors[0]


@dataclass
class _TensorAt:
    """Marks the place of a tensor in the skeleton of a state."""

    index: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def _take_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The skeleton of nested dicts, lists and tuples; their tensors are appended to `tensors`."""
    if isinstance(value, torch.Tensor):
        arrays.address_of_tensor(value)  # refuses what has no memory of its own
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


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int = 0, model: torch.nn.Module | None = None
) -> None:
    """Give every rank the optimizer state of one rank: options such as the learning rate, and per-parameter state.

    The root's optimizer is not changed in any way, and the other ranks need no state beforehand. The optimizers are
    of the same class and have the same parameters in the same groups on all ranks. `model` is Horovod's and not needed.

    Raises:
        CollectiveError: on every rank, if the root's state cannot be read or sent, or another rank cannot load it.
    """
    del model
    tensors: list[torch.Tensor] = []
    is_root = runtime.rank() == root_rank
    state: Any = None
    pairs: list[tuple[str, Any, Any]] = []
    if is_root:
        try:
            state = _take_tensors(optimizer.state_dict(), tensors)
            pairs = _pairs(tensors)
        except Exception as error:  # of the optimizer's own code: anything
            state = error
    state = broadcast_object(state if not isinstance(state, Exception) else _Unreadable(str(state)), root_rank)
    if isinstance(state, _Unreadable):
        raise CollectiveError(
            f"broadcast_optimizer_state: rank {root_rank} could not read the state of its optimizer: {state.why}"
        )
    if not is_root:
        found: dict[int, _TensorAt] = {}
        _find_shapes(state, found)
        places = [found[i] for i in range(len(found))]
        tensors = [torch.empty_strided(place.shape, place.strides, dtype=place.dtype, device="cpu") for place in places]
        pairs = _pairs(tensors)
    _broadcast(pairs, root_rank, "broadcast_optimizer_state")
    failure: Exception | None = None
    if not is_root:
        try:
            optimizer.load_state_dict(_put_tensors(state, tensors))
        except Exception as error:  # of the optimizer's own code: anything
            failure = error
    told = "" if failure is None else f"rank {runtime.rank()} could not load the state of rank {root_rank}: {failure}"
    failures = [text for text in allgather_object(told) if text]
    if failure is not None:
        raise failure
    if failures:
        raise CollectiveError(f"broadcast_optimizer_state: {failures[0]}")


def _pairs(tensors: list[torch.Tensor]) -> list[tuple[str, Any, Any]]:
    return [(str(i), *_target_and_buffer(str(i), tensor)) for i, tensor in enumerate(tensors)]


@dataclass
class _Unreadable:
    """Sent in place of a state: why it could not be read."""

    why: str
