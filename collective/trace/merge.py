"""The parts of all ranks as one trace: clocks aligned, and arrows between what belongs together.

Arrows. An operation has a slice on each rank: that of its wait for the other ranks or its turn, or, of a bucket, which
waits for nobody before it starts, that of its run. One arrow leads through them in the order in which the ranks came,
so that it ends at the rank for which all others have waited.

Clocks. A rank's clock is taken to drift evenly between its comparisons with rank 0's; a rank that was killed has one.

What a killed rank leaves may end in the middle of a line, which is left out.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from .. import _core
from ..errors import InvalidArgumentError
from .part import CLOCK, END, HEADER

__all__ = ["merge"]

Event = dict[str, Any]
Key = tuple[str, str, int]  # the group, the name, and the number, alike on all ranks


@dataclass
class _Part:
    """What a part says. Its events are parsed when they are needed: as objects they take ten times the room."""

    source: str
    lines: list[bytes]
    header: Event = field(default_factory=dict)
    clocks: list[Event] = field(default_factory=list)
    dropped: int = 0
    is_cut: bool = True  # its rank did not come to write the end

    @property
    def rank(self) -> int:
        rank: int = self.header["rank"]
        return rank

    def events(self) -> Iterator[Event]:
        """Those for viewers."""
        for line in self.lines:
            event = json.loads(line)
            if event["name"] not in (HEADER, CLOCK, END):
                yield event

    def aligned(self, us: float) -> float:
        """A time of this rank's by rank 0's clock."""
        if not self.clocks:
            return us
        first, last = self.clocks[0], self.clocks[-1]
        ahead: float = first["ahead"]
        if last["at"] > first["at"]:
            ahead += (last["ahead"] - ahead) * (us - first["at"]) / (last["at"] - first["at"])
        return us - ahead


def _read(source: str, content: bytes) -> _Part:
    part = _Part(source, [])
    lines = [line.strip().rstrip(b",") for line in content.splitlines()]
    for line in lines:
        if line in (b"[", b"]", b""):
            continue
        try:
            event = json.loads(line)
            name, what = event["name"], event.get("args", {})
        except (ValueError, TypeError, KeyError):
            break  # its rank was killed while it wrote
        part.lines.append(line)
        if name == HEADER:
            part.header = what
        elif name == CLOCK:
            part.clocks.append(what)
        elif name == END:
            part.dropped, part.is_cut = what["dropped"], False
    if not part.header:
        raise InvalidArgumentError(f"{source} is no rank's part of a trace")
    return part


def _checked(parts: list[_Part]) -> list[_Part]:
    """By rank; raises InvalidArgumentError where they do not belong together."""
    if not parts:
        raise InvalidArgumentError("there are no parts to merge")
    parts = sorted(parts, key=lambda part: part.rank)
    for one, other in itertools.pairwise(parts):
        if one.header["job"] != other.header["job"]:
            raise InvalidArgumentError(f"{one.source} and {other.source} are parts of different traces")
        if one.rank == other.rank:
            raise InvalidArgumentError(f"{one.source} and {other.source} are both of rank {one.rank}")
    return parts


def _key(event: Event) -> Key | None:
    """Of the slice by which a rank came to an operation; None for all else."""
    if event.get("cat") == "wait" or (event.get("cat") == "run" and event["args"]["kind"] == "bucket"):
        what = event["args"]
        return what.get("group", ""), event["name"], what["number"]
    return None


def _remarks(parts: list[_Part]) -> list[str]:
    """What a reader of the trace must know is not there."""
    remarks = []
    missing = sorted({*range(parts[0].header["ranks"])} - {part.rank for part in parts})
    if missing:
        remarks.append(f"there is no part of {_core.ranks_text(missing)}")
    if cut := [part.rank for part in parts if part.is_cut]:
        remarks.append(f"the end of {_core.ranks_text(cut)} is missing, as of processes that were killed")
    if full := [part for part in parts if part.dropped]:
        ranks, events = _core.ranks_text([part.rank for part in full]), sum(part.dropped for part in full)
        remarks.append(f"the trace was full: the last {events} events of {ranks} were dropped")
    return remarks


def merge(parts: Iterable[tuple[str, bytes]], path: Path) -> list[str]:
    """Make one trace of parts.

    Args:
        parts: where each is from, for errors, and its content.
        path: of the trace, which takes the place of a file there; gzip if it ends in .gz.

    Returns:
        What is not in the trace, in sentences without a full stop.

    Raises:
        InvalidArgumentError: there are none, or they do not belong together.
        OSError: the trace cannot be written.
    """
    checked = _checked([_read(source, content) for source, content in parts])
    remarks = _remarks(checked)
    arrivals: dict[Key, list[tuple[float, int]]] = {}
    origin = math.inf  # where the trace begins
    for part in checked:
        for event in part.events():
            if "ts" in event:
                at = part.aligned(event["ts"])
                origin = min(origin, at)
                if key := _key(event):
                    arrivals.setdefault(key, []).append((at, part.rank))
    if math.isinf(origin):
        origin = checked[0].aligned(checked[0].header["clock"])
    places: dict[Key, int] = {}  # the number of each operation that several ranks came to
    for key, came in arrivals.items():
        if len(came) > 1:
            came.sort()
            places[key] = len(places) + 1
    with _replacing(path) as file:
        about = json.dumps({"displayTimeUnit": "ms", "otherData": _about(checked, origin, remarks)})
        file.write(about[:-1].encode() + b',"traceEvents":[\n')
        before = b""
        for part in checked:
            for event in part.events():
                for line in _lines(part, event, origin, arrivals, places):
                    file.write(before + json.dumps(line).encode())
                    before = b",\n"
        file.write(b"\n]}\n")
    return remarks


def _about(parts: list[_Part], origin: float, remarks: list[str]) -> Event:
    first = parts[0]
    began = first.header["seconds_since_1970"] + (origin - first.aligned(first.header["clock"])) * 1e-6
    delays = [reading["delay"] for part in parts for reading in part.clocks]
    return {
        "ranks": first.header["ranks"],
        "began": datetime.fromtimestamp(began, timezone.utc).isoformat(),
        "clocks": {f"rank {part.rank}": part.clocks for part in parts},
        "clocks_agree_to_us": round(max(delays, default=0.0) / 2, 3),
        "remarks": remarks,
    }


def _lines(
    part: _Part, event: Event, origin: float, arrivals: dict[Key, list[tuple[float, int]]], places: dict[Key, int]
) -> Iterator[Event]:
    """The event by rank 0's clock, and its end of an arrow."""
    if "ts" not in event:
        yield event
        return
    at = part.aligned(event["ts"])
    if "dur" in event:
        event["dur"] = round(part.aligned(event["ts"] + event["dur"]) - at, 3)
    event["ts"] = round(at - origin, 3)
    key = _key(event)
    if key is None or key not in places:
        yield event
        return
    came = arrivals[key]
    event["args"]["came_after_first_us"] = round(at - came[0][0], 3)
    event["args"]["last_to_come"] = f"rank {came[-1][1]}"
    yield event
    phase = "s" if part.rank == came[0][1] else "f" if part.rank == came[-1][1] else "t"
    arrow = {"name": "the same operation", "cat": "operation", "ph": phase, "id": places[key]}
    yield {**arrow, **{name: event[name] for name in ("pid", "tid", "ts")}, **({"bp": "e"} if phase == "f" else {})}


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """A new file, which takes the place of what is at the path once it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if path.suffix == ".gz":
                with gzip.GzipFile(filename="", fileobj=file, mode="wb") as packed:
                    yield packed
            else:
                yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise
