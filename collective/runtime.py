"""The runtime of this process, and where this rank stands; lifecycle.py creates and ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import _core, process
from .config import Config
from .errors import NotInitializedError

if TYPE_CHECKING:
    from mpi4py import MPI

    from .outofband import Channel

__all__ = [
    "cross_rank",
    "cross_size",
    "describe",
    "is_homogeneous",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "size",
]


_AHEAD_S = 0.7


class Runtime:
    """What init() made: the engine, the settings and the topology."""

    def __init__(self, comm: MPI.Intracomm, config: Config, channel: Channel | None = None) -> None:
        from mpi4py import MPI

        self.config = config
        self.channel = channel  # to the other processes, beside MPI
        # After how many seconds the engine tells of a wait; if it can be explained, that takes time.
        self.patience = config.stall_warning - (min(_AHEAD_S, config.stall_warning / 2) if channel else 0)
        self.engine = _core.Engine(
            comm=MPI._handleof(comm),
            fusion_threshold=config.fusion_threshold,
            stall_warning=self.patience,
            timeout=config.timeout,
            shared_memory=config.shared_memory,
            nccl=config.nccl,
            cores=config.thread_affinity,
        )
        self.prepared_devices: set[int] = set()  # see devices.py
        self.at_end: list[Callable[[], None]] = []  # called when the engine has shut down
        self.in_child: list[Callable[[], None]] = []  # called in a forked child
        self.topology = self.engine.topology
        self.comm = comm
        self._unnamed: dict[tuple[str, int], int] = {}  # operations without a name so far, by kind and group
        self._numbers: dict[tuple[str, int], int] = {}

    def name_for(self, kind: str, group: int) -> str:
        """The next name for an unnamed operation: equal on all ranks that call in the same order."""
        number = self._unnamed.get((kind, group), 0)
        self._unnamed[kind, group] = number + 1
        return f"{kind}.unnamed.{number}"

    def restart_names(self, group: int) -> None:
        """Count unnamed operations from zero again: ranks that joined have made fewer calls than the others."""
        self._unnamed = {key: number for key, number in self._unnamed.items() if key[1] != group}

    def next_number(self, kind: str, process_set: int = 0) -> int:
        """0, 1, 2, ... for each kind of thing and each process set (by its id): equal on all ranks of the set.

        Counted from init() on, so that ranks agree whatever they did before it.
        """
        number = self._numbers.get((kind, process_set), 0)
        self._numbers[kind, process_set] = number + 1
        return number


_runtime: Runtime | None = None


def set_current(state: Runtime | None) -> None:
    """Make this the runtime of this process; None for none. For lifecycle.py."""
    global _runtime
    _runtime = state


def is_initialized() -> bool:
    """Whether init() was called in this process and shutdown() was not."""
    return _runtime is not None and not process.is_forked()


def current() -> Runtime:
    """The runtime; raises NotInitializedError or ForkError where there is none. For this package's modules."""
    if _runtime is None or process.is_forked():
        process.refuse_child()
        raise NotInitializedError("the runtime has not been initialized: call init() first")  # Horovod's words
    return _runtime


def _topology() -> _core.Topology:
    """Where this rank stands: plain memory, which a forked child may read, too."""
    return (_runtime or current()).topology


def rank() -> int:
    """This rank's number, 0 to size() - 1."""
    return _topology().rank


def size() -> int:
    """The number of ranks."""
    return _topology().size


def local_rank() -> int:
    """This rank's number among the ranks of its node, 0 to local_size() - 1."""
    return _topology().local_rank


def local_size() -> int:
    """The number of ranks on this node."""
    return _topology().local_size


def cross_rank() -> int:
    """This node's number among the nodes that have a rank with this local_rank()."""
    return _topology().cross_rank


def cross_size() -> int:
    """The number of nodes that have a rank with this local_rank()."""
    return _topology().cross_size


def is_homogeneous() -> bool:
    """Whether every node has the same number of ranks."""
    return _topology().homogeneous


def describe() -> str:
    """The engine's state in words: what is in flight and what it waits for. For debugging a hang."""
    return current().engine.describe()
