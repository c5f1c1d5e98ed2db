"""Where this rank's script is, told to ranks that wait for it, in warnings and errors about what is late.

A thread of its own looks at the main thread's stack when the engine asks (csrc/engine/whereabouts.h), whatever that
thread does meanwhile. If it is in a C function that keeps the interpreter to itself, nothing can be told.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from .runtime import Runtime

__all__ = ["call_site", "stack", "watch", "where"]

_MOST_FRAMES = 4
_END_S = 1.0
_PACKAGE = f"{Path(__file__).parent}{os.sep}"


def watch(state: Runtime) -> None:
    """Look whenever the engine asks, until it has shut down."""
    engine = state.engine

    def look() -> None:
        while engine.wait_for_question():
            engine.tell_where(where()[0])

    thread = threading.Thread(target=look, name="collective-whereabouts", daemon=True)
    thread.start()
    state.at_end.append(lambda: thread.join(_END_S))


def where() -> tuple[str, bool]:
    """The main thread's innermost frames, outside this package: "train.py:42 in validate, called from train.py:80".

    And whether it is in a function of this package.
    """
    frames = list(_frames())
    places: list[str] = []
    for frame in frames:
        code = frame.f_code
        if not code.co_filename.startswith(_PACKAGE) and len(places) < _MOST_FRAMES:
            name = "" if code.co_name == "<module>" else f" in {code.co_name}"
            places.append(f"{Path(code.co_filename).name}:{frame.f_lineno}{name}")
    return ", called from ".join(places), bool(frames) and frames[0].f_code.co_filename.startswith(_PACKAGE)


def call_site() -> str:
    """The line outside this package from which the caller was called: "train.py:42"."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_PACKAGE) and frame.f_back is not None:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def stack() -> list[str]:
    """All of the main thread's frames, the innermost first: "/home/a/train.py:42 in validate"."""
    return [f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" for frame in _frames()]


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back
