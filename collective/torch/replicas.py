"""Replica guard: whether all ranks hold the same model, bit for bit.

Data-parallel training starts from equal replicas and adds equal gradients, so parameters and optimizer state stay
equal without ever being compared. A script that draws on one rank only, a parameter that no optimizer reduces, a bad
memory chip: each makes replicas drift apart, which shows as a model that learns a little less.

    each rank   hashes every tensor to 64 bits (XXH3), and these hashes, with names, shapes and dtypes, to two words
    one call    gathers two words a rank
    only if they differ: the ranks exchange the lists of names and hashes, and find the first that differs

The words are gathered by name and in one short message, so a check costs what reading the tensors once costs.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from .. import arrays, movement, runtime
from ..errors import CollectiveError, InvalidArgumentError, ReplicaError
from ..objects import allgather_object, broadcast_object
from ..process_sets import ProcessSet, global_process_set
from .state import broadcast_named

__all__ = ["Difference", "ReplicaReport", "check_optimizer", "check_replicas"]

_LABEL = "check_replicas"
_SHOWN = 6  # names in a warning


@dataclass(frozen=True)
class Difference:
    """A tensor, or a number of an optimizer, of which not all ranks have the same bits."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    """Those whose bits are not the majority's; in a tie, not those of the lowest rank that is in it."""

    def __str__(self) -> str:
        which = "rank" if len(self.ranks) == 1 else "ranks"
        return f"'{self.name}' ({self.dtype} {self.shape}) on {which} {', '.join(map(str, self.ranks))}"


@dataclass(frozen=True)
class ReplicaReport:
    """What a check found; equal on all ranks."""

    count: int
    """How many tensors and numbers were compared."""
    nbytes: int
    """How many bytes of tensors each rank has read."""
    differences: tuple[Difference, ...] = ()
    """What differed, and was repaired."""


@dataclass(frozen=True)
class _Item:
    """Something that replicas have in common: a tensor, or a plain value in a container of the optimizer's."""

    name: str
    value: Any
    holder: Any = None  # the dict or list that a plain value is in (None: a tuple); a tensor is overwritten in place
    key: Any = None

    @property
    def dtype(self) -> str:
        return str(self.value.dtype if isinstance(self.value, torch.Tensor) else type(self.value).__name__)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape) if isinstance(self.value, torch.Tensor) else ()


@dataclass(frozen=True)
class _Digests:
    """What ranks compare in detail: an entry for each item."""

    rank: int
    names: list[str]
    kinds: list[tuple[str, tuple[int, ...]]]  # dtype and shape
    hashes: list[int]


def check_replicas(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    repair: bool = False,
    process_set: ProcessSet = global_process_set,
    buffers: bool = True,
) -> ReplicaReport:
    """Compare the parameters and buffers of a model, and an optimizer's state, between ranks, bit by bit; collective.

    Args:
        model: the same on all ranks. Its tensors are read and, except for a repair, left as they are.
        optimizer: also compare its state and its options, such as step counters, moments and learning rates.
        repair: overwrite what differs by the values of rank 0 (of a process set: of its lowest rank), with a warning
            that names it, in place of an error.
        process_set: the ranks that compare; only these call it.
        buffers: False leaves out the model's buffers. BatchNorm's statistics are such, and each rank has its own.

    Returns:
        How much was compared, and what was repaired.

    Raises:
        ReplicaError: on every rank: something differs; or names, shapes or dtypes do, which cannot be repaired.
        CollectiveError: on every rank: a tensor of one of them cannot be read, as it is sparse, quantized, or has no
            memory of its own.
    """
    if not isinstance(model, torch.nn.Module):
        raise InvalidArgumentError(f"check_replicas takes a torch.nn.Module, not a {type(model).__qualname__}")
    names: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters()}
    items = [_Item(name, p) for p, name in names.items()]
    if buffers:
        items += [_Item(name, buffer) for name, buffer in model.named_buffers()]
    if optimizer is not None:
        items += _items_of_state(optimizer, names)
    return _check(items, repair, process_set)


def check_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], process_set: ProcessSet, state: bool
) -> ReplicaReport:
    """Compare the parameters of an optimizer, named by `names`, and, if asked, its state; collective.

    For DistributedOptimizer.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    items = [_Item(names.get(p, f"parameter.{number}"), p) for number, p in enumerate(held)]
    if state:
        items += _items_of_state(optimizer, names)
    return _check(items, False, process_set)


# ---- what is compared ----


def _items_of_state(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str]) -> list[_Item]:
    """The state of each parameter, and the options of each group."""
    items: list[_Item] = []
    held = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {p: number for number, p in enumerate(held)}
    # In the order of the parameters: ranks may have stepped them in different orders. What an optimizer keeps under
    # other keys comes last.
    keys = sorted(optimizer.state, key=lambda key: (numbers.get(key, len(held)), "" if key in numbers else str(key)))
    for key in keys:
        name = names.get(key, f"parameter.{numbers[key]}") if key in numbers else str(key)
        items += _items_in(f"optimizer.state.{name}", optimizer.state[key])
    for number, group in enumerate(optimizer.param_groups):
        options = {option: value for option, value in group.items() if option != "params"}
        items += _items_in(f"optimizer.group.{number}", options, group)
    return items


def _items_in(name: str, container: Any, holder: Any = None) -> Iterator[_Item]:
    """Tensors and plain values in nested dicts, lists and tuples; other objects are not compared.

    holder: where to put values for a repair, if not into the container itself.
    """
    if holder is None and not isinstance(container, tuple):
        holder = container
    entries = (
        sorted(container.items(), key=lambda e: str(e[0])) if isinstance(container, dict) else enumerate(container)
    )
    for key, value in entries:
        below = f"{name}.{key}"
        if isinstance(value, torch.Tensor):
            yield _Item(below, value)
        elif _is_plain(value):
            yield _Item(below, value, holder, key)
        elif isinstance(value, dict | list | tuple):
            yield from _items_in(below, value)


def _is_plain(value: Any) -> bool:
    """Whether it is a number, a text, None, or a tuple of such, which is replaced as a whole."""
    if isinstance(value, tuple):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | complex | str)


def _hash_of(item: _Item) -> int:
    if not isinstance(item.value, torch.Tensor):
        return xxhash.xxh3_64_intdigest(repr(item.value).encode())
    try:
        arrays.address_of_tensor(item.value)  # refuses what has no memory of its own
        tensor = item.value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        return xxhash.xxh3_64_intdigest(tensor.reshape(-1).view(torch.uint8).numpy().data)
    except Exception as error:  # from a tensor's own class, too: the others are about to wait
        known = type(error) if isinstance(error, CollectiveError) else CollectiveError
        raise known(f"rank {runtime.rank()}: {_LABEL}: '{item.name}': {error}") from error


# ---- the comparison ----


def _check(items: list[_Item], repair: bool, process_set: ProcessSet) -> ReplicaReport:
    failure: Exception | None = None
    own = _Digests(runtime.rank(), [item.name for item in items], [(item.dtype, item.shape) for item in items], [])
    try:
        own.hashes.extend(_hash_of(item) for item in items)
    except CollectiveError as error:
        failure = error
    # Named, because ranks may have made different numbers of unnamed calls before. A rank that has joined sends none.
    words = np.array([[_structure(own), _content(own), failure is not None]], dtype=np.uint64)
    told = movement.allgather(words, name=_LABEL, process_set=process_set)
    if told[:, 2].any():
        texts = allgather_object("" if failure is None else str(failure), f"{_LABEL}.failures", process_set)
        raise failure or CollectiveError(next(text for text in texts if text))
    nbytes = sum(item.value.nbytes for item in items if isinstance(item.value, torch.Tensor))
    if (told == told[0]).all():
        return ReplicaReport(len(items), nbytes)
    everyone = allgather_object(own, f"{_LABEL}.details", process_set)
    _compare_structure(everyone)
    differences = _differences(everyone)
    if not repair:
        raise ReplicaError(_text(differences, len(items)))
    different = {difference.name for difference in differences}
    _repair([item for item in items if item.name in different], process_set)
    warnings.warn(
        f"{_text(differences, len(items))}. Overwritten by the values of rank {process_set.ranks[0]}: "
        + ", ".join(f"'{difference.name}'" for difference in differences[:_SHOWN])
        + (f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""),
        stacklevel=3,
    )
    return ReplicaReport(len(items), nbytes, tuple(differences))


def _structure(digests: _Digests) -> int:
    return xxhash.xxh3_64_intdigest(repr((digests.names, digests.kinds)).encode())


def _content(digests: _Digests) -> int:
    return xxhash.xxh3_64_intdigest(np.array(digests.hashes, dtype=np.uint64).data)


def _compare_structure(everyone: list[_Digests]) -> None:
    """Raise if ranks have different names, shapes or dtypes."""
    first = everyone[0]
    for other in everyone[1:]:
        if other.names != first.names:
            counts = (
                f"rank {first.rank} has {len(first.names)} tensors and numbers, rank {other.rank} {len(other.names)}"
            )
            for rank, names, others in (
                (first.rank, first.names, set(other.names)),
                (other.rank, other.names, set(first.names)),
            ):
                extra = [name for name in names if name not in others]
                if extra:
                    raise ReplicaError(f"{_LABEL}: {counts}; of these two only rank {rank} has '{extra[0]}'")
            raise ReplicaError(f"{_LABEL}: {counts}, in another order")
        for name, here, there in zip(first.names, first.kinds, other.kinds, strict=True):
            if here != there:
                raise ReplicaError(
                    f"{_LABEL}: '{name}' is {here[0]} {here[1]} on rank {first.rank}, "
                    f"{there[0]} {there[1]} on rank {other.rank}"
                )


def _differences(everyone: list[_Digests]) -> list[Difference]:
    found = []
    first = everyone[0]
    for number, name in enumerate(first.names):
        hashes = [digests.hashes[number] for digests in everyone]
        majority = Counter(hashes).most_common(1)[0][0]  # of equally many, the one that comes first
        ranks = tuple(digests.rank for digests in everyone if digests.hashes[number] != majority)
        if ranks:
            found.append(Difference(name, *first.kinds[number], ranks))
    return found


def _text(differences: list[Difference], count: int) -> str:
    text = f"{_LABEL}: {len(differences)} of {count} tensors and numbers differ between ranks, first {differences[0]}"
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    if all(difference.name.endswith(statistics) for difference in differences):
        text += " (statistics of BatchNorm, which each rank gathers by itself: buffers=False leaves them out)"
    return text


def _repair(items: list[_Item], process_set: ProcessSet) -> None:
    root = process_set.ranks[0]
    fixed = next((item for item in items if not isinstance(item.value, torch.Tensor) and item.holder is None), None)
    if fixed is not None:
        raise ReplicaError(f"{_LABEL}: '{fixed.name}' differs between ranks, and is in a tuple: it cannot be repaired")
    tensors = [(item.name, item.value) for item in items if isinstance(item.value, torch.Tensor)]
    broadcast_named(tensors, root, _LABEL, process_set)
    plain = [item for item in items if not isinstance(item.value, torch.Tensor)]
    if plain:
        values = broadcast_object([item.value for item in plain], root, f"{_LABEL}.values", process_set)
        for item, value in zip(plain, values, strict=True):
            item.holder[item.key] = value
