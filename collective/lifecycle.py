"""Start and end of the runtime, and the making of process sets.

The top of the package: making a set is itself collective, so this builds on the operations, which know nothing of it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from . import (
    _core,
    job_end,
    launcher,
    ledger,
    likeness,
    logs,
    mpi,
    process,
    recording,
    runtime,
    stalls,
    steps,
    timeline,
    watching,
    whereabouts,
)
from . import process_sets as sets
from .config import Config, LogLevel
from .errors import CollectiveTimeoutError, InvalidArgumentError, MismatchError
from .movement import barrier
from .objects import allgather_object
from .process_sets import ProcessSet, global_process_set
from .trace import session as trace

if TYPE_CHECKING:
    from mpi4py import MPI

    from .outofband import Channel

__all__ = ["add_process_set", "init", "remove_process_set", "shutdown"]

_hooked = False


def init(
    comm: Sequence[int] | MPI.Intracomm | None = None,
    process_sets: Iterable[ProcessSet | Iterable[int]] | str | None = None,
) -> None:
    """Start the runtime; collective over the ranks of `comm`. A second call changes nothing.

    Args:
        comm: None for all ranks that were launched; a list of ranks of MPI_COMM_WORLD, passed identically by exactly
            these ranks, which are renumbered in its order; or an mpi4py communicator, which is duplicated.
        process_sets: sets to register at once, as with `add_process_set`; or "dynamic", which Horovod needs for adding
            sets later and which changes nothing here.

    Raises:
        ForkError: in a forked child, a multiprocessing worker, or a child that a rank has started with its environment.
        MPIMismatchError: mpi4py loaded another MPI than the one this package was built for.
        InvalidArgumentError: a malformed setting, MPI without MPI_THREAD_MULTIPLE, a list that lacks this rank, a
            process set that is not one, a timeline or trace that cannot be written, metrics that cannot be served, or a
            launcher that has started several processes, each of them alone (torchrun, or the launcher of another MPI).
        MismatchError: versions of this package, or byte orders of machines, that differ between ranks.
        CollectiveTimeoutError: a rank did not call it within COLLECTIVE_TIMEOUT. The job ends with this process.

    After any other error nothing is left behind, and init() may be called again.
    """
    process.refuse_child()
    if runtime.is_initialized():
        return
    config = Config.from_environment()
    process.refuse_heir()
    logs.start(config.log_level)
    try:
        _init(comm, process_sets, config)
    except BaseException:
        logs.stop()
        raise


def _init(
    comm: Sequence[int] | MPI.Intracomm | None,
    process_sets: Iterable[ProcessSet | Iterable[int]] | str | None,
    config: Config,
) -> None:
    if isinstance(process_sets, str) and process_sets != "dynamic":
        raise InvalidArgumentError(f'init(process_sets={process_sets!r}): a list of process sets, or "dynamic"')
    if not isinstance(process_sets, Iterable | None):
        raise InvalidArgumentError(f"init(process_sets={process_sets!r}): a list of process sets, not one of them")
    wanted = [] if process_sets is None or isinstance(process_sets, str) else list(process_sets)
    mpi.start()
    from mpi4py import MPI

    if not (isinstance(comm, MPI.Comm) and comm == MPI.COMM_SELF):  # whoever passes that means to be alone
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
    try:
        watching.start(runtime.current())
        for process_set in wanted:
            add_process_set(process_set)
    except BaseException:
        shutdown()
        raise


def _start(comm: MPI.Intracomm, config: Config) -> None:
    """Create the runtime on this communicator, which it then owns."""
    try:
        config = likeness.agree(comm, config)
        timeline.open_at_start(comm, config.timeline)
        trace.open_at_start(comm, config)
    except (InvalidArgumentError, MismatchError):  # on all ranks
        timeline.give_up()
        comm.Free()
        raise
    channel: Channel | None = None
    try:
        if config.out_of_band and comm.Get_size() > 1:
            from .outofband import open_channel  # whose asyncio takes a while to import, and one rank has no use for it

            channel = open_channel(comm)
            if channel is None and comm.Get_rank() == 0:
                _core.log(
                    LogLevel.WARNING,
                    "not all nodes reach an address of rank 0's by TCP: warnings of stalls will tell less, and "
                    "`collective top` will not see this job (COLLECTIVE_OUT_OF_BAND=0 makes this the choice)",
                )
        state = runtime.Runtime(comm, config, channel)
    except BaseException:
        timeline.give_up()
        if channel is not None:
            channel.close()
        trace.give_up()
        raise
    runtime.set_current(state)
    steps.restart()
    process.mark(state.topology.rank)
    whereabouts.watch(state)
    if channel is not None:
        stalls.watch(state, channel)
        state.at_end.append(channel.close)
        state.in_child.append(channel.close_in_child)
    sets.register_global()
    timeline.record_at_start()
    trace.record_at_start()
    if state.topology.rank == 0:
        for warning in (mpi.other_version(), launcher.advice_about_cores(state.topology.local_size)):
            if warning is not None:
                _core.log(LogLevel.WARNING, warning)
    logs.flush()


def shutdown() -> None:
    """End the runtime; collective: returns when every rank has called it. Runs by itself at exit and in MPI_Finalize.

    Rank 0 tells if a rank has held up the others, see `stragglers`.

    Operations in which other ranks still wait for this one raise ShutdownError there. Ranks that are still at work,
    as on a last checkpoint, are waited for; warnings name them. After the time-out it returns without them, and
    MPI_Finalize keeps waiting: whether they are doing something useful cannot be seen from here.
    """
    if not runtime.is_initialized():
        return
    try:
        timeline.stop_timeline()
    finally:  # the other ranks wait for this one, whether or not a file can be written
        state = runtime.current()
        runtime.set_current(None)
        try:
            if state.engine.shutdown():
                trace.merge_at_end(state.comm)
                if state.config.stragglers:
                    ledger.tell(state.engine)
                sets.free_communicators()
                state.comm.Free()
        except CollectiveTimeoutError as error:
            _core.log(LogLevel.WARNING, f"{error}. MPI_Finalize waits for it.")
        finally:
            with contextlib.ExitStack() as ends:  # all of them, whatever becomes of one
                ends.callback(logs.stop)
                ends.callback(sets.forget_all)
                for end in reversed(state.at_end):
                    ends.callback(end)
                trace.leave()


def _shutdown_at_exit() -> None:
    if not process.is_forked():
        shutdown()
        mpi.end_if_someone_is_missing()


def _after_fork_in_child() -> None:
    if runtime.is_initialized():
        state = runtime.current()
        process.after_fork(state.topology.rank)
        for close in state.in_child:
            close()
        # Its thread does not exist here, and its destructor would call MPI.
        _core.leak(state.engine)


def _place() -> tuple[int, int] | None:
    return (runtime.rank(), runtime.size()) if runtime.is_initialized() else None


def _last_words() -> None:
    recording.flush()
    logs.flush()


def _install_hooks() -> None:
    global _hooked
    if _hooked:
        return
    _hooked = True
    atexit.register(_shutdown_at_exit)
    mpi.before_finalize(_shutdown_at_exit)
    os.register_at_fork(after_in_child=_after_fork_in_child)
    job_end.install(_place, shutdown, _last_words)


def add_process_set(process_set: ProcessSet | Iterable[int]) -> ProcessSet:
    """Register a process set; collective over all ranks, including those not in it.

    Returns:
        The set, now usable.

    Raises:
        MismatchError: on every rank, when ranks gave different sets.
        InvalidArgumentError: a set of these ranks is registered, or the ranks are not valid.
    """
    state = runtime.current()
    try:
        if process_set is global_process_set:
            raise InvalidArgumentError("the global process set is registered already")
        wanted = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
        ranks: list[int] | str = wanted.ranks
    except InvalidArgumentError as error:
        ranks = str(error)  # told to the others, which would wait otherwise
    everyone = allgather_object(ranks)
    if isinstance(ranks, str):
        raise InvalidArgumentError(ranks)
    for rank, theirs in enumerate(everyone):
        if theirs != ranks:
            raise MismatchError(
                f"add_process_set: rank {runtime.rank()} gave the ranks {ranks}, rank {rank} gave {theirs}"
            )
    # A set of all ranks is allowed once beside the global one: scripts that compute their sets do not check for it.
    if any(ranks == known.ranks for known in sets.registered() if known is not global_process_set):
        raise InvalidArgumentError(f"a process set of the ranks {ranks} is registered already")
    comm = group = None
    if runtime.rank() in ranks:
        from mpi4py import MPI

        comm = state.comm.Create_group(state.comm.Get_group().Incl(ranks))
        group = state.engine.add_group(MPI._handleof(comm))
    sets.register(wanted, state.next_number("process set") + 1, ranks, group, comm)  # 0 is the global one
    return wanted


def remove_process_set(process_set: ProcessSet) -> bool:
    """Unregister a set; collective over all ranks. Operations in flight on it raise ShutdownError.

    Returns:
        False if it was not registered (nothing happens then), else True.
    """
    if process_set is global_process_set:
        raise InvalidArgumentError("the global process set cannot be removed")
    state = runtime.current()
    if process_set.process_set_id is None:
        return False
    if process_set.group is not None:
        state.engine.remove_group(process_set.group)
        process_set.mpi_comm.Free()
    sets.unregister(process_set)
    barrier()
    return True
