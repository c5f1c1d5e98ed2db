"""What the engine records, and those that write it down: a thread hands it to them about once a second."""

from __future__ import annotations

import threading
from typing import Protocol

from . import _core

__all__ = ["Sink", "attach", "detach", "flush"]

_WRITE_EVERY_S = 1.0


class Sink(Protocol):
    """What writes down."""

    def add(self, recorded: _core.Recorded) -> bool:
        """Write it down; False for no more, please."""
        ...


class _Recording:
    """The thread, and for whom the engine records."""

    def __init__(self, engine: _core.Engine, sink: Sink) -> None:
        self._engine = engine
        self.sinks = [sink]
        self._writing = threading.Lock()
        self._over = threading.Event()
        engine.start_timeline()
        self._thread = threading.Thread(target=self._run, name="collective recording", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(_WRITE_EVERY_S):
            self.flush()

    def flush(self, more: Sink | None = None, less: Sink | None = None) -> None:
        """Hand on what has been recorded since the last time; what comes later is for one more or one less."""
        with self._writing:
            recorded = self._engine.take_timeline()
            self.sinks = [sink for sink in self.sinks if sink.add(recorded) and sink is not less]
            if more is not None:
                self.sinks.append(more)
            if not self.sinks:
                self._engine.stop_timeline()

    def end(self) -> None:
        self._over.set()
        self._thread.join()


_recording: _Recording | None = None


def attach(engine: _core.Engine, sink: Sink) -> None:
    """From now on, what this engine records is for this sink, too."""
    global _recording
    if _recording is not None and not _recording.sinks:  # none of them could go on
        _recording.end()
        _recording = None
    if _recording is None:
        _recording = _Recording(engine, sink)
    else:
        _recording.flush(more=sink)


def detach(sink: Sink) -> None:
    """Hand it the rest, and no more; nothing happens if it is not attached."""
    global _recording
    if _recording is None:
        return
    _recording.flush(less=sink)
    if not _recording.sinks:
        _recording.end()
        _recording = None


def flush() -> None:
    """Have everything written down: this process is about to be ended, say."""
    if _recording is not None:
        _recording.flush()
