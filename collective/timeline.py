"""A trace of this rank's operations, for chrome://tracing or Perfetto."""

from __future__ import annotations

import json
from pathlib import Path

from . import runtime
from .errors import InvalidArgumentError

__all__ = ["start_timeline", "stop_timeline"]

_path: Path | None = None


def start_timeline(file_path: str | Path, mark_cycles: bool = False) -> None:
    """Begin to record when operations are negotiated and when they run.

    Args:
        file_path: where stop_timeline(), or shutdown(), writes the trace of rank 0: Chrome's JSON format, a row per
            operation name. At most a million events are kept.
        mark_cycles: Horovod's; there are no cycles here to mark.
    """
    global _path
    del mark_cycles
    engine = runtime.current().engine
    if _path is not None:
        raise InvalidArgumentError(f"a timeline is being recorded already, for {_path}")
    _path = Path(file_path)
    engine.start_timeline()


def stop_timeline() -> None:
    """End the recording and write the file; without a recording nothing happens."""
    global _path
    state = runtime.current()
    path, _path = _path, None
    if path is None:
        return
    recorded = state.engine.stop_timeline()
    if state.topology.rank != 0:
        return
    rows = {name: number for number, name in enumerate(dict.fromkeys(name for name, *_ in recorded))}
    events: list[dict[str, object]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": name}} for name, row in rows.items()
    ]
    events += [
        {"name": phase, "ph": "X", "pid": 0, "tid": rows[name], "ts": begin, "dur": duration}
        for name, phase, begin, duration in recorded
    ]
    path.write_text(json.dumps(events))
