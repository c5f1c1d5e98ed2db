"""What must hold of every trace of all ranks."""

import gzip
import itertools
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Trace:
    """One that has been read, and keeps the laws."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        self.content: Event = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
        self.about: Event = self.content["otherData"]
        self.events: list[Event] = self.content["traceEvents"]
        self.slices = [event for event in self.events if event["ph"] == "X"]
        self.processes = [event["args"]["name"] for event in self.events if event["name"] == "process_name"]
        self._threads_do_one_thing_at_a_time()
        self._arrows_lead_from_the_first_to_the_last()
        self._nobody_ends_before_the_last_has_begun()

    def names(self, rank: int, phase: str) -> list[str]:
        """The slices of a rank, in the order of their ends."""
        return [event["name"] for event in self.slices if event["pid"] == rank + 1 and event["cat"] == phase]

    def _grouped(self, events: list[Event], key: Callable[[Event], Any]) -> dict[Any, list[Event]]:
        found = defaultdict(list)
        for event in events:
            found[key(event)].append(event)
        return found

    def _threads_do_one_thing_at_a_time(self) -> None:
        assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in self.slices)
        for found in self._grouped(self.slices, lambda event: (event["pid"], event["tid"])).values():
            found.sort(key=lambda event: event["ts"])
            for one, other in itertools.pairwise(found):
                assert one["ts"] + one["dur"] <= other["ts"] + 0.002, (one, other)  # rounded

    def _arrows_lead_from_the_first_to_the_last(self) -> None:
        starts = {(event["pid"], event["tid"], event["ts"]): event for event in self.slices}
        self.arrows = self._grouped([event for event in self.events if event["ph"] in "stf"], lambda e: e["id"])
        for arrow in self.arrows.values():
            ends = sorted(arrow, key=lambda event: ("stf".index(event["ph"]), event["ts"]))
            assert [event["ph"] for event in ends] == ["s", *"t" * (len(ends) - 2), "f"]
            assert [event["ts"] for event in ends] == sorted(event["ts"] for event in ends)
            at = [starts[event["pid"], event["tid"], event["ts"]] for event in ends]
            assert len({event["pid"] for event in at}) == len(at)
            assert len({(event["name"], event["args"]["number"], event["args"].get("group")) for event in at}) == 1
            assert {event["args"]["last_to_come"] for event in at} == {f"rank {at[-1]['pid'] - 1}"}

    def _nobody_ends_before_the_last_has_begun(self) -> None:
        runs = [
            event for event in self.slices if event["cat"] == "run" and event["args"]["kind"] in ("allreduce", "bucket")
        ]
        for event in runs:
            assert event["args"]["bytes"] > 0

        def key(event: Event) -> Any:
            what = event["args"]
            return what.get("group"), what["number"], event["name"] if what["kind"] == "bucket" else None

        for found in self._grouped(runs, key).values():
            last_begin = max(event["ts"] for event in found)
            first_end = min(event["ts"] + event["dur"] for event in found)
            assert last_begin <= first_end + 2 * self.about["clocks_agree_to_us"] + 0.002, found
