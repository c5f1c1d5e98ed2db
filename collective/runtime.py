"""The runtime of this process: start, end, and where this rank stands."""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import _core
from .config import Config, launched_size
from .errors import ForkError, InvalidArgumentError, MPIMismatchError, NotInitializedError

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
        self._made: dict[tuple[str, int | None], int] = {}
        self._process_sets = 0  # registered so far, removed ones included

    def name_for(self, kind: str, group: int) -> str:
        """The next name for an unnamed operation: equal on all ranks that call in the same order."""
        number = self._unnamed.get((kind, group), 0)
        self._unnamed[kind, group] = number + 1
        return f"{kind}.unnamed.{number}"

    def restart_names(self, group: int) -> None:
        """Count unnamed operations from zero again: ranks that joined have made fewer calls than the others."""
        self._unnamed = {key: number for key, number in self._unnamed.items() if key[1] != group}

    def next_number(self, what: str, group: int | None) -> int:
        """Counts what the ranks of a process set make in the same order, from zero in each run of the runtime."""
        number = self._made.get((what, group), 0)
        self._made[what, group] = number + 1
        return number

    def next_process_set_id(self) -> int:
        """A number for a new process set, equal on all ranks."""
        self._process_sets += 1
        return self._process_sets


_runtime: _Runtime | None = None
_forked_from: int | None = None  # the rank, in a child that was forked after init()
_hooked = False


def init(
    comm: Sequence[int] | MPI.Intracomm | None = None,
    process_sets: Sequence[ProcessSet] | str | None = None,
) -> None:
    """Start the runtime; collective over the ranks of `comm`. A second call changes nothing.

    Args:
        comm: None for all ranks that were launched; a list of ranks of MPI_COMM_WORLD, given alike by exactly these
            ranks, which are renumbered in the list's order; or an mpi4py communicator. It is duplicated.
        process_sets: sets to register at once, as with `add_process_set`; or "dynamic", which Horovod needs for adding
            sets later and which changes nothing here.

    Raises:
        ForkError: in a forked child or a multiprocessing worker.
        MPIMismatchError: mpi4py loaded another MPI than the one this package was built for.
        InvalidArgumentError: a malformed setting, MPI without MPI_THREAD_MULTIPLE, a list that lacks this rank, or
            a launcher of another MPI (which starts N jobs of one rank).
    """
    global _runtime
    _refuse_in_child()
    if _runtime is not None:
        return
    config = Config.from_environment()
    if "mpi4py.MPI" not in sys.modules:
        import mpi4py

        # Its own exit handler would finalise MPI in forked children as well, which crashes or hangs them.
        mpi4py.rc.finalize = False
        atexit.register(_finalize_mpi, os.getpid())
    from mpi4py import MPI  # initialises MPI, in this thread

    _check_same_mpi(MPI.Get_library_version())
    if isinstance(process_sets, str) and process_sets != "dynamic":
        raise InvalidArgumentError(f'init(process_sets={process_sets!r}): a list of process sets, or "dynamic"')
    if isinstance(comm, MPI.Comm) and not comm:
        raise InvalidArgumentError("init(comm=MPI.COMM_NULL): a rank that is in no communicator takes no part")
    if comm is None:
        _check_launcher(MPI.COMM_WORLD.Get_size())
        own = MPI.COMM_WORLD.Dup()
    else:
        own = comm.Dup() if isinstance(comm, MPI.Comm) else _communicator_of(comm)
    _runtime = _Runtime(own, config)
    _install_hooks()
    from . import process_sets as sets

    sets.register_global()
    if config.timeline:
        from .timeline import start_timeline

        start_timeline(config.timeline)
    for process_set in () if process_sets is None or isinstance(process_sets, str) else process_sets:
        sets.add_process_set(process_set)


def _finalize_mpi(pid: int) -> None:
    from mpi4py import MPI

    if os.getpid() == pid and MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.Finalize()


def _communicator_of(ranks: Sequence[int]) -> MPI.Intracomm:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    members = list(ranks)
    me = world.Get_rank()
    if me not in members or len(set(members)) < len(members) or not all(0 <= r < world.Get_size() for r in members):
        raise InvalidArgumentError(
            f"init(comm={members}) on rank {me} of {world.Get_size()}: the list must hold distinct ranks of "
            f"MPI_COMM_WORLD and be given by its members only"
        )
    return world.Create_group(world.Get_group().Incl(members))


def _check_same_mpi(loaded_by_mpi4py: str) -> None:
    """Compare the MPI of mpi4py with the one that the engine was built for and the one it is linked to."""

    def first_line(text: str) -> str:
        return text.strip("\0\n ").splitlines()[0].split(",")[0]

    built, runs = _core.built_for_mpi(), _core.running_mpi()
    is_open_mpi = "Open MPI" in runs
    if first_line(loaded_by_mpi4py) == first_line(runs) and ("Open MPI" in built) == is_open_mpi:
        return
    raise MPIMismatchError(
        f"this package was built for {built} and runs with {first_line(runs)} ({_core.running_mpi_path()}), but mpi4py "
        f"loaded {first_line(loaded_by_mpi4py)}. Install this package again with the mpicxx of that MPI first on PATH "
        f"(or in MPICXX), or let mpi4py use the other MPI."
    )


def _check_launcher(size: int) -> None:
    variable, launched = launched_size()
    if size == 1 and launched > 1:
        raise InvalidArgumentError(
            f"{variable}={launched}, but this process is alone in MPI_COMM_WORLD: it was started by the launcher of "
            f"another MPI than {_core.built_for_mpi()}. Use the mpirun of that MPI, or srun with the PMI that it "
            f"speaks (srun --mpi=list; --mpi=pmix for Open MPI)."
        )


def shutdown() -> None:
    """End the runtime; collective: returns when every rank has called it. Runs at exit by itself.

    Operations that other ranks still wait for from this rank raise ShutdownError there.
    """
    global _runtime
    if _runtime is None or _forked_from is not None:
        return
    from . import process_sets as sets
    from .timeline import stop_timeline

    try:
        stop_timeline()
    finally:  # the other ranks wait for this one, whether or not a file can be written
        runtime, _runtime = _runtime, None
        if runtime.engine.shutdown():
            sets.free_communicators()
            runtime.comm.Free()
        sets.forget_all()


def is_initialized() -> bool:
    """Whether init() was called in this process and shutdown() was not."""
    return _runtime is not None and _forked_from is None


def current() -> _Runtime:
    """The runtime; raises NotInitializedError or ForkError where there is none. For this package's modules."""
    if _runtime is None or _forked_from is not None:
        _refuse_in_child()
        raise NotInitializedError("collective has not been initialized: call init() first")
    return _runtime


def rank() -> int:
    """This rank's number, 0 to size() - 1."""
    return current().topology.rank


def size() -> int:
    """The number of ranks."""
    return current().topology.size


def local_rank() -> int:
    """This rank's number among the ranks of its node, 0 to local_size() - 1."""
    return current().topology.local_rank


def local_size() -> int:
    """The number of ranks on this node."""
    return current().topology.local_size


def cross_rank() -> int:
    """This node's number among the nodes that have a rank with this local_rank()."""
    return current().topology.cross_rank


def cross_size() -> int:
    """The number of nodes that have a rank with this local_rank()."""
    return current().topology.cross_size


def is_homogeneous() -> bool:
    """Whether every node has the same number of ranks."""
    return current().topology.homogeneous


def describe() -> str:
    """The engine's state in words: what is in flight and what it waits for. For people who look at a hang."""
    return current().engine.describe()


def _refuse_in_child() -> None:
    if _forked_from is not None:
        raise ForkError(
            f"this process was forked from rank {_forked_from} after init(): MPI cannot be used in it. Do the "
            f"collective operations in the parent, or start workers with the 'spawn' or 'forkserver' method."
        )
    if multiprocessing.parent_process() is not None:
        raise ForkError("init() was called in a multiprocessing worker (such as a DataLoader's), which is no rank")


def _after_fork_in_child() -> None:
    global _forked_from
    if _runtime is not None and _forked_from is None:
        _forked_from = _runtime.topology.rank
        # Its thread does not exist here, and its destructor would call MPI.
        _core.leak(_runtime.engine)


def _install_hooks() -> None:
    global _hooked
    if _hooked:
        return
    _hooked = True
    atexit.register(shutdown)
    os.register_at_fork(after_in_child=_after_fork_in_child)
    previous = sys.excepthook

    def abort_job(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
        """Print the traceback, then end all ranks: they would wait for this one until the time-out."""
        previous(kind, error, trace)
        if not is_initialized():
            return
        ranks = size()
        sys.stdout.flush()
        if ranks > 1:
            print(
                f"[collective] rank {rank()}: uncaught {kind.__name__}, ends the job of {ranks} ranks", file=sys.stderr
            )
            # A hook around this one may hold back what it prints (torch.distributed's does), and never come to show it.
            if isinstance(sys.stderr, io.StringIO) and sys.__stderr__ is not None:
                sys.__stderr__.write(sys.stderr.getvalue())
                sys.__stderr__.flush()
            sys.stderr.flush()
            from mpi4py import MPI

            MPI.COMM_WORLD.Abort(1)

    sys.excepthook = abort_job
