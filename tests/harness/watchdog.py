"""A test that hangs ends, and tells where: the stacks of all threads and the state of the engine."""

import faulthandler
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# Seconds from the limit until a C thread ends the process: for where the watchdog's own thread cannot run or
# gets stuck, as when the GIL is never given back. The launcher's own watchdog waits longer still.
STUCK_SECONDS = 10.0
OWN_THREAD = "pytest-ranks"  # the name of a thread that serves the tests, and is not part of what hangs
PYTEST = re.compile(r"[/\\](_pytest|pluggy)[/\\]")


def engine_state() -> str:
    """What the engine says of itself, if there is one."""
    runtime: Any = sys.modules.get("collective.runtime")
    if runtime is None or not sys.modules["collective"].is_initialized():
        return "not initialised"
    return str(runtime.describe())


def thread_stacks() -> str:
    """Where each Python thread stands, without pytest's own frames and threads.

    Not by faulthandler, which prints some thirty frames of pytest for one of the test's.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    text = []
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, "not started by Python")
        if ident == threading.get_ident() or name == OWN_THREAD:
            continue
        stack = traceback.extract_stack(frame)
        machinery = [n for n, line in enumerate(stack) if PYTEST.search(line.filename)]
        below = machinery[-1] + 1 if machinery else 0
        text.append(f"thread {name}:\n" + "".join(traceback.format_list(stack[below:] or stack)))
    return "\n".join(text)


class Watchdog:
    """Watches what the main thread does: past its limit, prints all it can and calls `end(what)`."""

    def __init__(self, config: pytest.Config, name: str, end: Callable[[str], None]) -> None:
        self.capture: Any = config.pluginmanager.get_plugin("capturemanager")
        self.name = name
        self.end = end
        # A copy, as pytest redirects descriptor 2 during a test.
        self.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        self.timer = threading.Timer(0, lambda: None)

    def arm(self, what: str, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds + STUCK_SECONDS, exit=True, file=self.stderr)
        self.timer = threading.Timer(seconds, self._expired, (f"{what} exceeded its limit of {seconds:g} s",))
        self.timer.daemon = True
        self.timer.start()

    def disarm(self) -> None:
        self.timer.cancel()
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def watch(self, what: str, seconds: float) -> Iterator[None]:
        self.arm(what, seconds)
        try:
            yield
        finally:
            self.disarm()

    def _expired(self, what: str) -> None:
        print(f"\n{self.name}: hang: {what}", file=self.stderr)
        print(thread_stacks(), file=self.stderr)
        print(f"{self.name}: its engine:", file=self.stderr)
        try:  # after the stacks, as it may wait for ever for a lock of the engine's
            print(engine_state(), file=self.stderr)
        except Exception:
            traceback.print_exc(file=self.stderr)
        if self.capture is not None and self.capture.is_globally_capturing():
            captured = self.capture.read_global_capture()
            print(f"{self.name}: its output:", *captured, sep="\n", file=self.stderr)
        self.end(what)
