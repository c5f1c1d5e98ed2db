"""The runtime of this process: start, end, and where this rank stands."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from . import _core, job_end, launcher, mpi, process
from .config import Config, LogLevel
from .errors import CollectiveTimeoutError, InvalidArgumentError, NotInitializedError

if TYPE_CHECKING:
    from mpi4py import MPI

    from .process_sets import ProcessSet

__all__ = [
    "cross_rank",
    "cross_size",
    "describe",
    "init",
    "is_homogeneous",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "shutdown",
    "size",
]


class _Runtime:
    """What init() made: the engine, the settings and the topology."""

    def __init__(self, comm: MPI.Intracomm, config: Config) -> None:
        from mpi4py import MPI

        self.config = config
        self.engine = _core.Engine(
            comm=MPI._handleof(comm),
            fusion_threshold=config.fusion_threshold,
            stall_warning=config.stall_warning,
            timeout=config.timeout,
            shared_memory=config.shared_memory,
            nccl=config.nccl,
            cores=config.thread_affinity,
        )
        self.prepared_devices: set[int] = set()  # see devices.py
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
        """0, 1, 2, ... for each kind of thing and each process set by its id: equal on all its ranks.

        Counted from init() on: ranks that were in another job before, or in none, count alike.
        """
        number = self._numbers.get((kind, process_set), 0)
        self._numbers[kind, process_set] = number + 1
        return number


_runtime: _Runtime | None = None
_hooked = False


def init(
    comm: Sequence[int] | MPI.Intracomm | None = None,
    process_sets: Iterable[ProcessSet | Iterable[int]] | str | None = None,
) -> None:
    """Start the runtime; collective over the ranks of `comm`. A second call changes nothing.

    Args:
        comm: None for all ranks that were launched; a list of ranks of MPI_COMM_WORLD, given alike by exactly these
            ranks, which are renumbered in the list's order; or an mpi4py communicator. It is duplicated.
        process_sets: sets to register at once, as with `add_process_set`; or "dynamic", which Horovod needs for adding
            sets later and which changes nothing here.

    Raises:
        ForkError: in a forked child, a multiprocessing worker, or a child that a rank has started with its environment.
        MPIMismatchError: mpi4py loaded another MPI than the one this package was built for.
        InvalidArgumentError: a malformed setting, MPI without MPI_THREAD_MULTIPLE, a list that lacks this rank, a
            process set that is none, a timeline that cannot be written, or a launcher that has started several
            processes of which each is alone (torchrun, or the launcher of another MPI).
        CollectiveTimeoutError: a rank did not call it within COLLECTIVE_TIMEOUT. The job ends with this process.

    After any other error nothing is left behind, and init() may be called again.
    """
    process.refuse_child()
    if _runtime is not None:
        return
    config = Config.from_environment()
    _core.set_log_level(config.log_level)
    process.refuse_heir()
    if isinstance(process_sets, str) and process_sets != "dynamic":
        raise InvalidArgumentError(f'init(process_sets={process_sets!r}): a list of process sets, or "dynamic"')
    if not isinstance(process_sets, Iterable | None):
        raise InvalidArgumentError(f"init(process_sets={process_sets!r}): a list of process sets, not one of them")
    wanted = [] if process_sets is None or isinstance(process_sets, str) else list(process_sets)
    mpi.start()
    from mpi4py import MPI

    if not (isinstance(comm, MPI.Comm) and comm == MPI.COMM_SELF):  # whoever gives that means to be alone
        launcher.check(MPI.COMM_WORLD.Get_size())
    if isinstance(comm, MPI.Comm) and not comm:
        raise InvalidArgumentError("init(comm=MPI.COMM_NULL): a rank that is in no communicator takes no part")
    if comm is None:
        comm = MPI.COMM_WORLD
    _install_hooks()
    if isinstance(comm, MPI.Comm):
        mpi.meet(comm, config)
        own = comm.Dup()
    else:
        own = mpi.communicator_of(comm, config)
    _start(own, config)
    from . import process_sets as sets

    try:
        for process_set in wanted:
            sets.add_process_set(process_set)
    except BaseException:
        shutdown()
        raise


def _start(comm: MPI.Intracomm, config: Config) -> None:
    """Make the runtime on this communicator, which it then owns."""
    global _runtime
    from . import process_sets as sets
    from . import timeline

    try:
        timeline.open_at_start(comm, config.timeline)
    except InvalidArgumentError:  # on all ranks
        comm.Free()
        raise
    try:
        _runtime = _Runtime(comm, config)
    except BaseException:
        timeline.give_up()
        raise
    process.mark(_runtime.topology.rank)
    sets.register_global()
    timeline.record_at_start()
    if _runtime.topology.rank == 0:
        for warning in (mpi.other_version(), launcher.advice_about_cores(_runtime.topology.local_size)):
            if warning is not None:
                _core.log(LogLevel.WARNING, warning)


def shutdown() -> None:
    """End the runtime; collective: returns when every rank has called it. Runs at exit, and in MPI_Finalize, by itself.

    Operations that other ranks still wait for from this rank raise ShutdownError there. Ranks that are still at work,
    as with a last checkpoint, are waited for; warnings name them. After the time-out it returns without them, and
    MPI_Finalize goes on waiting: whether they do something useful cannot be seen from here.
    """
    global _runtime
    if _runtime is None or process.is_forked():
        return
    from . import process_sets as sets
    from .timeline import stop_timeline

    try:
        stop_timeline()
    finally:  # the other ranks wait for this one, whether or not a file can be written
        runtime, _runtime = _runtime, None
        try:
            if runtime.engine.shutdown():
                sets.free_communicators()
                runtime.comm.Free()
        except CollectiveTimeoutError as error:
            _core.log(LogLevel.WARNING, f"{error}. MPI_Finalize waits for it.")
        finally:
            sets.forget_all()


def _shutdown_at_exit() -> None:
    if not process.is_forked():
        shutdown()
        mpi.end_if_someone_is_missing()


def is_initialized() -> bool:
    """Whether init() was called in this process and shutdown() was not."""
    return _runtime is not None and not process.is_forked()


def current() -> _Runtime:
    """The runtime; raises NotInitializedError or ForkError where there is none. For this package's modules."""
    if _runtime is None or process.is_forked():
        process.refuse_child()
        raise NotInitializedError("the runtime has not been initialized: call init() first")  # Horovod's words
    return _runtime


def _topology() -> _core.Topology:
    """Where this rank stands: mere memory, which a forked child may read as well."""
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
    """The engine's state in words: what is in flight and what it waits for. For people who look at a hang."""
    return current().engine.describe()


def _after_fork_in_child() -> None:
    if _runtime is not None and not process.is_forked():
        process.after_fork(_runtime.topology.rank)
        # Its thread does not exist here, and its destructor would call MPI.
        _core.leak(_runtime.engine)


def _install_hooks() -> None:
    global _hooked
    if _hooked:
        return
    _hooked = True
    from .timeline import flush

    atexit.register(_shutdown_at_exit)
    mpi.before_finalize(_shutdown_at_exit)
    os.register_at_fork(after_in_child=_after_fork_in_child)
    job_end.install(lambda: (rank(), size()) if is_initialized() else None, shutdown, flush)
