"""A launcher as a child: it gets the signals that this process gets, and its exit status is ours."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence

from .options import Problem

__all__ = ["run_launcher"]

_FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


def run_launcher(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run it to its end, and return its status as a shell has it: 128 and the signal's number if one has ended it.

    A signal that the kernel has sent, Ctrl-C at a terminal, has reached the launcher already: it is in the same process
    group, so that it can read from the terminal. Open MPI takes a second one as the wish to leave at once.
    """
    awaited = {*_FORWARDED, signal.SIGCHLD}
    # Blocked from before the start, so that none is lost; the launcher starts with the mask that we had.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    try:
        try:
            # A shell starts what runs in the background with SIGINT off, which mpirun would keep.
            pid = os.posix_spawn(
                command[0], list(command), dict(environment), setsigmask=before, setsigdef={signal.SIGINT}
            )
        except OSError as error:
            raise Problem(f"{command[0]} does not start: {error.strerror}") from None
        while True:
            found = signal.sigwaitinfo(awaited)
            if found.si_signo == signal.SIGCHLD:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                    return code if code >= 0 else 128 - code
            elif found.si_code <= 0:  # SI_USER and its kin: another process has sent it to us
                os.kill(pid, found.si_signo)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
