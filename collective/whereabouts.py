"""Where this rank's script is, told to ranks that wait for it, in warnings and errors about what is late.

A thread of its own looks at the main thread's stack when the engine asks (csrc/engine/whereabouts.h), whatever that
thread does meanwhile. If it is in a C function that keeps the interpreter to itself, nothing can be told.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import FrameType

from .runtime import Runtime

__all__ = ["watch"]

_MOST_FRAMES = 4
_END_S = 1.0
_PACKAGE = f"{Path(__file__).parent}{os.sep}"


def watch(state: Runtime) -> None:
    """Look whenever the engine asks, until it has shut down."""
    engine = state.engine

    def look() -> None:
        while engine.wait_for_question():
            engine.tell_where(_where())

    thread = threading.Thread(target=look, name="collective-whereabouts", daemon=True)
    thread.start()
    state.at_end.append(lambda: thread.join(_END_S))


def _where() -> str:
    """The main thread's innermost frames, outside this package: "train.py:42 in validate, called from train.py:80"."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    places: list[str] = []
    while frame is not None and len(places) < _MOST_FRAMES:
        code = frame.f_code
        if not code.co_filename.startswith(_PACKAGE):
            name = "" if code.co_name == "<module>" else f" in {code.co_name}"
            places.append(f"{Path(code.co_filename).name}:{frame.f_lineno}{name}")
        frame = frame.f_back
    return ", called from ".join(places)
