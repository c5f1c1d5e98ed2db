"""The timeline: a trace of rank 0's operations, on demand."""

import json
from pathlib import Path

import numpy as np
import pytest

import collective
from collective.timeline import start_timeline, stop_timeline
from mpi_plugin import World


@pytest.mark.ranks(2)
def test_timeline(world: World, tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    start_timeline(path)
    with pytest.raises(collective.InvalidArgumentError, match="already"):
        start_timeline(path)
    for turn in range(3):
        collective.allreduce(np.ones(100), name="weights")
        collective.broadcast(np.ones(100), turn % 2, name="other")
    stop_timeline()
    stop_timeline()
    assert path.exists() == (world.rank == 0)
    if world.rank == 0:
        events = json.loads(path.read_text())
        spans = [event for event in events if event["ph"] == "X"]
        assert sorted({event["name"] for event in spans}) == ["allreduce", "broadcast", "negotiate"]
        assert len(spans) == 12
        assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
        assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"weights", "other"}
