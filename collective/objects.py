"""Python objects over the wire: pickled, and sent as bytes."""

from __future__ import annotations

import pickle
from typing import Any, TypeVar

import cloudpickle
import numpy as np

from . import movement, runtime
from .errors import CollectiveError
from .process_sets import ProcessSet, global_process_set

__all__ = ["allgather_object", "broadcast_object"]

T = TypeVar("T")


def _pickled(obj: Any) -> tuple[np.ndarray, Exception | None]:
    """The object's bytes and None; if it cannot be pickled, those of a text that says so, and the error."""
    try:
        try:
            # First by name: a class of the script is then the same class on every rank.
            data = pickle.dumps(obj, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception:  # lambdas, classes made within functions, and whatever else has no name
            data = cloudpickle.dumps(obj)
        return np.frombuffer(data, dtype=np.uint8), None
    except Exception as error:  # from the object's own code: anything
        text = f"rank {runtime.rank()} could not pickle its {type(obj).__qualname__}: {error}"
        return np.frombuffer(text.encode(), dtype=np.uint8), error


def _told(size: int, data: np.ndarray, error: Exception | None) -> None:
    """Raise if the size says that what was sent is the text of an error."""
    if error is not None:
        raise error
    if size < 0:
        raise CollectiveError(data.tobytes().decode())


def broadcast_object(
    obj: T, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> T:
    """Send a picklable object from one rank to all.

    Args:
        obj: any object that pickle or, failing that, cloudpickle can serialise; only the root's counts.
        root_rank: the rank that sends, the same on all ranks.
        name: matches the call of the same name on the other ranks; calls without one come in the same order everywhere.
        process_set: the ranks that take part; `root_rank` is numbered among all ranks.

    Returns:
        `obj` itself on the root, a copy of it elsewhere.

    Raises:
        CollectiveError: the root could not pickle its object (on the root: the original error). The job goes on.
    """
    is_root = runtime.rank() == root_rank
    data, error = _pickled(obj) if is_root else (np.empty(0, dtype=np.uint8), None)
    own = np.array([-data.size if error else data.size], dtype=np.int64)
    size = int(movement.broadcast(own, root_rank, name=f"{name}.size" if name else None, process_set=process_set)[0])
    if not is_root:
        data = np.empty(abs(size), dtype=np.uint8)
    data = movement.broadcast(data, root_rank, name=f"{name}.data" if name else None, process_set=process_set)
    _told(size, data, error)
    result: T = obj if is_root else pickle.loads(data.tobytes())
    return result


def allgather_object(obj: T, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[T]:
    """Collect a picklable object from every rank.

    Args:
        obj: this rank's object; types and sizes may differ between ranks.
        name, process_set: as for `broadcast_object`.

    Returns:
        The objects of all ranks, in rank order; this rank's own is a copy too.
    """
    data, error = _pickled(obj)
    own = np.array([-data.size if error else data.size], dtype=np.int64)
    sizes = movement.allgather(own, name=f"{name}.size" if name else None, process_set=process_set)
    gathered = movement.allgather(data, name=f"{name}.data" if name else None, process_set=process_set)
    parts = np.split(gathered, np.cumsum(abs(sizes))[:-1])
    for size, part in zip(sizes, parts, strict=True):
        _told(int(size), part, error)
    return [pickle.loads(part.tobytes()) for part in parts]
