"""The ranks that take part in a benchmark, and what is said on behalf of all of them."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .. import runtime

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Job", "has_torch"]


def has_torch() -> bool:
    """Whether torch is installed; it is not imported."""
    return importlib.util.find_spec("torch") is not None


@dataclass
class Job:
    """All ranks, with a communicator of the benchmark's own for barriers and for gathering figures."""

    comm: MPI.Intracomm
    rank: int
    size: int
    local_size: int
    notes: list[str] = field(default_factory=list)  # what was left out and why, once each

    @classmethod
    def start(cls) -> Job:
        """A job of the ranks of the runtime, which is initialised already; collective."""
        from mpi4py import MPI

        return cls(MPI.COMM_WORLD.Dup(), runtime.rank(), runtime.size(), runtime.local_size())

    def progress(self, text: str) -> None:
        """Say what is being measured, on rank 0, and apart from the report."""
        if self.rank == 0:
            print(f"collective.bench: {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Remember for the report what was left out."""
        if text not in self.notes:
            self.notes.append(text)
