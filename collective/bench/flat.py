"""Ours as it would be if nodes were not known: a contender with an engine of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from .. import runtime
from .buffers import Buffer
from .job import Job
from .peers import Views

__all__ = ["Flat"]


class Flat(Views):
    """The optimizer's bucket without shared memory, as in a job with COLLECTIVE_SHARED_MEMORY=0.

    One ring leads through all ranks, and ranks of one node use messages, too. The setting holds for an engine, so this
    has a second one, which is the current one during its calls; it sleeps during those of the others.
    """

    def __init__(self, name: str, job: Job) -> None:
        super().__init__(name, job)
        config = replace(runtime.current().config, shared_memory=False)
        self._runtime = runtime.Runtime(job.comm.Dup(), config)

    def close(self) -> None:
        """End the engine; collective."""
        with self._current():
            self._made.clear()
        self._runtime.engine.shutdown()
        self._runtime.comm.Free()

    def bind(self, buffer: Buffer) -> Callable[[], object]:
        call = super().bind(buffer)

        def run() -> None:
            with self._current():
                call()

        return run

    def _reduction(self, buffer: Buffer) -> Any:
        with self._current():
            return super()._reduction(buffer)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        usual = runtime.current()
        runtime.set_current(self._runtime)
        try:
            yield
        finally:
            runtime.set_current(usual)
