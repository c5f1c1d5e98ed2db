"""Python objects over the wire: pickled, sent as bytes."""

from __future__ import annotations

from typing import Any, TypeVar

import cloudpickle
import numpy as np

from . import ops, runtime

__all__ = ["allgather_object", "broadcast_object"]

T = TypeVar("T")


def _bytes_of(obj: Any) -> np.ndarray:
    return np.frombuffer(cloudpickle.dumps(obj), dtype=np.uint8)


def broadcast_object(obj: T, root_rank: int = 0, name: str | None = None) -> T:
    """Send a picklable object from one rank to all.

    Args:
        obj: any object that cloudpickle can serialise; only the root's counts.
        root_rank: the rank that sends, the same on all ranks.
        name: meets the call of the same name on the other ranks; without one, calls come in the same order everywhere.

    Returns:
        `obj` itself on the root, a copy of it elsewhere.
    """
    is_root = runtime.rank() == root_rank
    data = _bytes_of(obj) if is_root else np.empty(0, dtype=np.uint8)
    nbytes = int(
        ops.broadcast(np.array([data.size], dtype=np.int64), root_rank, name=f"{name}.size" if name else None)[0]
    )
    if not is_root:
        data = np.empty(nbytes, dtype=np.uint8)
    data = ops.broadcast(data, root_rank, name=f"{name}.data" if name else None)
    result: T = obj if is_root else cloudpickle.loads(data.tobytes())
    return result


def allgather_object(obj: T, name: str | None = None) -> list[T]:
    """Collect a picklable object from every rank.

    Args:
        obj: this rank's object; types and sizes may differ between ranks.
        name: as for `broadcast_object`.

    Returns:
        The objects of all ranks, in rank order; this rank's own is a copy too.
    """
    data = _bytes_of(obj)
    sizes = ops.allgather(np.array([data.size], dtype=np.int64), name=f"{name}.size" if name else None)
    gathered = ops.allgather(data, name=f"{name}.data" if name else None)
    parts = np.split(gathered, np.cumsum(sizes)[:-1])
    return [cloudpickle.loads(part.tobytes()) for part in parts]
