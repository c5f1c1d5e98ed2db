"""The clocks of other ranks, compared with rank 0's by messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Reading", "compare"]

_PINGS = 16


@dataclass(frozen=True)
class Reading:
    """One comparison; all in seconds."""

    at: float  # what the other clock showed
    ahead: float  # by how much it was ahead of rank 0's
    delay: float  # of the message there and back: `ahead` is known to half of it


def compare(comm: MPI.Intracomm, others: Sequence[int], clock: Callable[[], float]) -> list[Reading]:
    """Compare these ranks' clocks with rank 0's, one after the other; collective. Returns the same on all ranks.

    Rank 0 asks several times for the time, and believes the answer that came fastest: it was given at some moment of
    the round trip, for which the middle is taken (Cristian, "Probabilistic clock synchronization", 1989; NTP's filter).

    Args:
        others: the same on all ranks; rank 0 may be among them, whose clock is its own.
        clock: returns seconds.
    """
    me = comm.Get_rank()
    theirs = np.zeros(1)
    readings = []
    for other in others:
        if other == 0:
            readings.append(Reading(clock(), 0.0, 0.0))
        elif me == 0:
            tries = []
            for _ in range(_PINGS):
                sent = clock()
                comm.Send(theirs, other)
                comm.Recv(theirs, other)
                received = clock()
                tries.append((received - sent, theirs[0], theirs[0] - (sent + received) / 2))
            delay, at, ahead = min(tries)
            readings.append(Reading(float(at), float(ahead), delay))
        elif me == other:
            for _ in range(_PINGS):
                comm.Recv(theirs, 0)
                theirs[0] = clock()
                comm.Send(theirs, 0)
    everyone: list[Reading] = comm.bcast(readings)
    return everyone
