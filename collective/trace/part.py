"""A rank's part of a trace: a file that viewers can open by itself, with what is needed to merge it with the others.

An array of events, one a line. Those that viewers do not know, of phase "M", are for merge.py: HEADER, the first one;
CLOCK, how this rank's clock compares with rank 0's; END, the last one unless the rank was killed. Times are
microseconds of this rank's monotonic clock.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from .. import _core
from ..clocks import Reading
from ..event_file import EventFile

__all__ = ["CLOCK", "END", "HEADER", "Part", "path_of"]

HEADER, CLOCK, END = "collective_trace", "collective_clock", "collective_end"

_FULL = "the trace is full: what follows is dropped"


def path_of(trace: Path, rank: int) -> Path:
    """Where a rank's part lies, beside the trace that is to be made of them."""
    stem = trace.name.removesuffix(".gz").removesuffix(".json")
    return trace.with_name(f"{stem}.rank{rank}.json")


class Part:
    """The file while it is being written: a sink of `recording`.

    Args:
        trace: the path of the trace.
        job: tells traces apart; the same on all ranks.
        rank, ranks: this rank, and how many there are.
        most: how many bytes it may have, nearly.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, trace: Path, job: str, rank: int, ranks: int, most: int) -> None:
        self.path = path_of(trace, rank)
        self._rank = rank
        self._most = most
        self._lines = _core.TraceLines(rank)
        self._dropped = 0
        self._is_full = False
        self._file = EventFile(self.path, f"rank {rank}'s part of the trace")
        host = socket.gethostname()
        now = {"clock": time.monotonic() * 1e6, "seconds_since_1970": time.time()}
        self._tell(HEADER, {"job": job, "rank": rank, "ranks": ranks, "host": host, **now})
        self._tell("process_name", {"name": f"rank {rank} on {host}"})
        self._tell("process_sort_index", {"sort_index": rank})

    def _tell(self, name: str, what: Mapping[str, object], **fields: object) -> None:
        event = {"name": name, "ph": "M", "pid": self._rank + 1, **fields, "args": what}
        self._file.add(json.dumps(event).encode() + b",\n")

    def add(self, recorded: _core.Recorded) -> bool:
        """Append what the engine has recorded, or count what there is no room for."""
        room = 0 if self._is_full else max(self._most - self._file.nbytes, 0)
        lines, dropped = self._lines.lines(recorded, room)
        is_open = self._file.add(lines)
        self._dropped += dropped
        if dropped and not self._is_full:
            self._is_full = True
            self._tell(_FULL, {}, ph="i", s="p", tid=0, ts=time.monotonic() * 1e6)
        return is_open

    def compare(self, reading: Reading) -> None:
        """This rank's clock was compared with rank 0's."""
        self._tell(CLOCK, {"at": reading.at * 1e6, "ahead": reading.ahead * 1e6, "delay": reading.delay * 1e6})

    def end(self) -> None:
        """Nothing comes after it."""
        self._tell(END, {"dropped": self._dropped})
        self._file.close()
