"""Jobs that are told to stop: all ranks learn of it after the same step, save what they have, and end well.

A signal may reach one rank only, or each at another time, between any two lines of the script. Here it sets a flag; the
ranks agree on it where the script asks, once a step.

How signals come to ranks, as tried with Open MPI 5 (PRRTE):

    SIGUSR1, SIGUSR2 to mpirun    forwarded to every rank, as often as they come; mpirun goes on, and its exit status is
                                  that of the ranks. This is the way to tell a job to stop.
    SIGTERM, SIGINT to mpirun     ends the job: SIGCONT to every rank, SIGTERM after 0.25 s, SIGKILL after another
                                  0.25 s; exit status 1. (odls_base_sigkill_timeout and prte_abort_timeout do not make
                                  that longer.) A step and a checkpoint rarely fit, and nothing that ranks print
                                  arrives any more.
    any signal to a rank          reaches this one alone; mpirun takes no notice of it while the rank lives.

Under Slurm, as tried with 22.05, `--signal=USR1@120` sends SIGUSR1 to the ranks that srun has started, 120 s before the
time limit or up to a minute earlier, and `scancel --signal=USR1` does so at once; `scancel` sends SIGTERM, and SIGKILL
after KillWait (30 s unless the site says otherwise). By its manual, preemption does the same, after the partition's
GraceTime.

An uncaught exception still ends the job at once (job_end.py), and so does a rank that dies of another signal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from . import _core, config, movement, reductions, runtime
from .errors import InvalidArgumentError
from .process_sets import ProcessSet, global_process_set
from .submission import Max

__all__ = ["Preemption"]

_SCONTROL_SECONDS = 60.0  # its own time-out for a controller that does not answer is shorter


class Preemption:
    """Hears signals that ask the job to stop, from when it is made until `close()` or the end of its `with` block.

    Args:
        signals: the signals to hear. They no longer do what they did before; a second one changes nothing. In processes
            that this one forks (the workers of a DataLoader or a Pool), SIGTERM does, and the others are ignored.
        every: at which calls of `requested()` the ranks ask each other: each, or one in so many. The same on all ranks.
        process_set: the ranks that agree.

    Made in the main thread, as Python sets signal handlers there only; before init() or after it. Before it is made, a
    signal ends its rank.

        with collective.Preemption() as guard:
            for step in ...:
                ...
                if guard.requested():
                    ...  # write a checkpoint
                    break
    """

    agreed_signal: signal.Signals | None = None
    """The signal that the ranks agreed on, once they have; of several, that with the highest number."""

    def __init__(
        self,
        signals: Iterable[int] = (signal.SIGTERM, signal.SIGUSR1),
        every: int = 1,
        process_set: ProcessSet = global_process_set,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise InvalidArgumentError(f"Preemption(every={every!r}): a positive number of calls")
        if threading.current_thread() is not threading.main_thread():
            raise InvalidArgumentError("Preemption is made in the main thread: Python sets signal handlers there only")
        self._every = every
        self._process_set = process_set
        self._joins = process_set.joins
        self._calls = 0
        self._heard = 0  # the number of the signal, here
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}
        try:
            for number in signals:
                self._previous[number] = signal.signal(number, self._hear)
        except (OSError, TypeError, ValueError) as error:  # SIGKILL, or no signal at all
            self.close()
            raise InvalidArgumentError(f"Preemption cannot hear signal {number!r}: {error}") from None

    def __enter__(self) -> Preemption:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the signals do again what they did before."""
        while self._previous:
            number, handler = self._previous.popitem()
            # None: set by other than Python code, which cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner:
            self._heard = max(self._heard, number)
        elif number == signal.SIGTERM:  # Pool.terminate(), for example
            handler = self._previous.get(number)
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
            os.kill(os.getpid(), number)

    def requested(self) -> bool:
        """Whether the job is to stop; collective: once a step on every rank. All get the same answer at the same call.

        Once it is True it stays so. With `every=n` it becomes True at calls n, 2n, ... only.
        """
        if self.agreed_signal is not None:
            return True
        if self._joins != self._process_set.joins:  # before that, ranks have made different numbers of calls
            self._joins = self._process_set.joins
            self._calls = 0
        self._calls += 1
        if self._calls % self._every:
            return False
        heard = np.array([self._heard], dtype=np.int32)
        agreed = int(reductions.allreduce(heard, Max, name="preemption.signal", process_set=self._process_set)[0])
        if agreed > 0:
            self.agreed_signal = signal.Signals(agreed)
            if self._is_first():
                _say(f"{self.agreed_signal.name} asks the job to stop: all ranks know")
        return agreed > 0

    def requeue(self) -> bool:
        """Have Slurm start this job again from its beginning, once it has ended; collective.

        Runs `scontrol requeue` on the first rank, when all have come here: call it when checkpoints are written, as
        Slurm then ends the job. Outside Slurm, or where that fails, it says so.

        Returns:
            Whether the job is queued again; the same on all ranks.
        """
        movement.barrier(process_set=self._process_set)
        done = np.array([self._is_first() and _requeue()], dtype=np.uint8)
        root = self._process_set.ranks[0]
        return bool(movement.broadcast(done, root, name="preemption.requeued", process_set=self._process_set)[0])

    def _is_first(self) -> bool:
        return runtime.rank() == self._process_set.ranks[0]


def _requeue() -> bool:
    job = config.slurm_job()
    if job is None:
        _say("not requeued: this is no Slurm job (SLURM_JOB_ID is not set)")
        return False
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SCONTROL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _say(f"Slurm job {job} is not requeued: {error}")
        return False
    if done.returncode != 0:
        told = (done.stderr or done.stdout).strip()
        _say(f"Slurm job {job} is not requeued: scontrol ended with status {done.returncode}: {told}")
        return False
    _say(f"Slurm job {job} is requeued")
    return True


def _say(text: str) -> None:
    _core.log(config.LogLevel.WARNING, text)
