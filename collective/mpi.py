"""The MPI of this process: that it is the one this package was built for, is initialised, and ends in order."""

from __future__ import annotations

import atexit
import concurrent.futures
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import _core
from .config import LogLevel
from .errors import CollectiveTimeoutError, InvalidArgumentError, MPIMismatchError
from .loading import import_mpi

if TYPE_CHECKING:
    from types import ModuleType

    from mpi4py import MPI

    from .config import Config

__all__ = [
    "before_finalize",
    "communicator_of",
    "end_if_someone_is_missing",
    "load",
    "meet",
    "name_and_version",
    "other_version",
    "srun_option",
    "start",
]

_watched = False
_someone_missing = False


def load() -> ModuleType:
    """mpi4py.MPI, compared with the MPI that the engine uses; nothing is initialised.

    Raises:
        MPIMismatchError: mpi4py finds none, or they differ.
    """
    if "mpi4py.MPI" not in sys.modules:
        import mpi4py

        # Two MPIs in one process must be reported before either is initialised. Also, mpi4py's own exit handler would
        # finalise MPI in forked children as well, which crashes or hangs them.
        mpi4py.rc.initialize = mpi4py.rc.finalize = False
    MPI = import_mpi()  # noqa: N806 - mpi4py's name

    _check_same(MPI.Get_library_version())
    return MPI


def start() -> None:
    """Compare mpi4py's MPI with ours; if nobody has yet, initialise it for several threads, and finalise it at exit."""
    MPI = load()  # noqa: N806
    if MPI.Is_finalized():
        raise InvalidArgumentError("MPI has been finalised in this process, and cannot be started again")
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        atexit.register(_finalize, os.getpid())
    if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        raise InvalidArgumentError(
            "MPI was initialised without MPI_THREAD_MULTIPLE, which the engine's thread needs. Call init() before "
            "anything else initialises MPI, or have that ask for MPI_THREAD_MULTIPLE (mpi4py does by default)."
        )


def _finalize(pid: int) -> None:
    from mpi4py import MPI

    if os.getpid() == pid and not MPI.Is_finalized():
        MPI.Finalize()


def before_finalize(function: Callable[[], None]) -> None:
    """Have `function` called when MPI_Finalize begins, whoever calls that; the first call in a process counts.

    MPI deletes the attributes of MPI_COMM_SELF first of all, while everything else is still allowed.
    """
    from mpi4py import MPI

    global _watched
    if not _watched:
        _watched = True
        keyval = MPI.Comm.Create_keyval(delete_fn=lambda comm, keyval, value: function())
        MPI.COMM_SELF.Set_attr(keyval, True)


def meet(comm: MPI.Intracomm, config: Config) -> None:
    """Wait for all ranks of the communicator, before calls that block silently; raises CollectiveTimeoutError."""
    global _someone_missing
    from mpi4py import MPI

    try:
        _core.meet(MPI._handleof(comm), config.stall_warning, config.timeout)
    except CollectiveTimeoutError:
        _someone_missing = True
        raise


def end_if_someone_is_missing() -> None:
    """End the job if a rank did not come to init(): MPI_Finalize would wait for it forever."""
    if not _someone_missing:
        return
    from mpi4py import MPI

    me = MPI.COMM_WORLD.Get_rank()
    sys.stdout.flush()
    print(f"[collective] rank {me}: ending the job, since a rank is missing", file=sys.stderr, flush=True)
    MPI.COMM_WORLD.Abort(1)


def communicator_of(ranks: Sequence[int], config: Config) -> MPI.Intracomm:
    """A new communicator of these ranks of MPI_COMM_WORLD, renumbered in this order; collective over them.

    Raises:
        InvalidArgumentError: numbers that are not ranks, or a list without this rank.
        CollectiveTimeoutError: one of them did not call it in time.
    """
    global _someone_missing
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    members = list(ranks)
    me = world.Get_rank()
    if me not in members or len(set(members)) < len(members) or not all(0 <= r < world.Get_size() for r in members):
        raise InvalidArgumentError(
            f"init(comm={members}) on rank {me} of {world.Get_size()}: the list must hold distinct ranks of "
            f"MPI_COMM_WORLD and be given by its members only"
        )
    # MPI_Comm_create_group waits for its members silently and without limit, so another thread calls it.
    made: concurrent.futures.Future[MPI.Intracomm] = concurrent.futures.Future()

    def make() -> None:
        try:
            made.set_result(world.Create_group(world.Get_group().Incl(members)))
        except BaseException as error:  # raised where the result is taken
            made.set_exception(error)

    threading.Thread(target=make, name="collective-init", daemon=True).start()
    waited, warn_after = 0.0, config.stall_warning
    while waited < config.timeout:
        until = min(warn_after, config.timeout)
        try:
            return made.result(None if math.isinf(until) else until - waited)
        except concurrent.futures.TimeoutError:
            waited, warn_after = until, 2 * until
        if waited < config.timeout and me in members[:2]:  # two of them, since one may be the missing one
            told = f"stalled: init on rank {me} waits for one of the ranks {members} since {waited:.1f} s"
            _core.log(LogLevel.WARNING, told)
    _someone_missing = True
    raise CollectiveTimeoutError(f"init: one of the ranks {members} did not call it within {waited:.1f} s")


def name_and_version(text: str) -> str:
    """What MPI_Get_library_version says, in short: "Open MPI 5.0.11", "MPICH 5.0.2"."""
    line = text.strip("\0\n ").splitlines()[0].split(",")[0]
    return " ".join(re.sub(r"\bVersion:|\bv(?=\d)", " ", line).split())


def other_version() -> str | None:
    """What to say if the MPI in use is of another version than the engine was built for; else None."""
    built, runs = _core.built_for_mpi(), name_and_version(_core.running_mpi())
    if built == runs or built.rpartition(" ")[0] != runs.rpartition(" ")[0]:
        return None  # the same, or relatives with one ABI (Intel MPI and MPICH), whose numbers do not compare
    return f"this package was built for {built} and runs with {runs} ({_core.running_mpi_path()}): {_INSTALL}"


_INSTALL = (
    "install this package again (pip install --no-cache-dir, or pip hands out what it built before) with the mpicxx of "
    "that MPI first on PATH, or in MPICXX"
)


def _check_same(loaded_by_mpi4py: str) -> None:
    """Compare the MPI of mpi4py with the one that the engine was built for and the one it is linked to."""
    built, runs = _core.built_for_mpi(), name_and_version(_core.running_mpi())
    loaded = name_and_version(loaded_by_mpi4py)
    if loaded == runs and built.startswith("Open MPI") == runs.startswith("Open MPI"):
        return
    raise MPIMismatchError(
        f"this package was built for {built} and runs with {runs} ({_core.running_mpi_path()}), but mpi4py loaded "
        f"{loaded}. Either {_INSTALL}; or let mpi4py use the other MPI."
    )


def srun_option() -> str:
    """The option with which srun starts ranks of the MPI in use."""
    return "--mpi=pmix" if _core.running_mpi().startswith("Open MPI") else "--mpi=pmi2"
