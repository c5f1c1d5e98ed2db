"""The contenders that reduce one buffer, or many: this package, and whatever else a user might call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .. import ops
from . import c10d
from .buffers import Buffer
from .job import Job, has_torch

__all__ = ["OURS", "PEERS", "Contender", "Views", "contenders"]

OURS = "ours"
PEERS = ("views", "c10d", "fp16", "bf16", "mpi", "mpi-pieces", "gloo", "memcpy")
"""What --peers takes: ours as an optimizer's bucket view, and through torch.distributed; ours with 16 bits on the wire;
MPI_Allreduce in one call, and in pieces; gloo; a local copy."""

_PIECE_BYTES = 4 << 20

Call = Callable[[], object]


class Contender:
    """A way to sum buffers in place over all ranks."""

    sums = True
    """False if it only moves as many bytes."""

    def __init__(self, name: str, job: Job) -> None:
        self.name = name
        self.job = job

    one_place = False
    """It reduces memory of its own, always the same."""

    def takes(self, dtype: str, nbytes: int) -> bool:
        """Whether it can reduce these, and is not then the same as another contender."""
        raise NotImplementedError

    def array(self, buffer: Buffer) -> Any:
        """What a bound call reduces."""
        return buffer.array

    def bind(self, buffer: Buffer) -> Call:
        """A blocking call on this buffer, ready to be made many times."""
        raise NotImplementedError

    def bind_all(self, buffers: Sequence[Buffer]) -> Call:
        """A call that reduces all of them, each by itself; the next starts while the last is in flight, if possible."""
        calls = [self.bind(buffer) for buffer in buffers]

        def run() -> None:
            for call in calls:
                call()

        return run


class _Ours(Contender):
    def __init__(self, name: str, job: Job, compression: ops.Compression | None) -> None:
        super().__init__(name, job)
        self._compression = compression

    def takes(self, dtype: str, nbytes: int) -> bool:
        return self._compression is None or dtype in ("float32", "float64")

    def bind(self, buffer: Buffer) -> Call:
        name = f"bench.{self.name}.{buffer.dtype}.{buffer.nbytes}"
        return partial(ops.allreduce_, buffer.array, ops.Sum, name=name, compression=self._compression)

    def bind_all(self, buffers: Sequence[Buffer]) -> Call:
        starts = [
            partial(
                ops.allreduce_async_,
                buffer.array,
                ops.Sum,
                name=f"bench.{self.name}.{number}",
                compression=self._compression,
            )
            for number, buffer in enumerate(buffers)
        ]

        def run() -> None:
            for handle in [start() for start in starts]:
                handle.wait()

        return run


class Views(Contender):
    """One gradient in a bucket, reduced in place by an optimizer's step() that does nothing else."""

    one_place = True

    def __init__(self, name: str, job: Job) -> None:
        super().__init__(name, job)
        self._made: dict[tuple[str, int], Any] = {}

    def takes(self, dtype: str, nbytes: int) -> bool:
        return has_torch()

    def _reduction(self, buffer: Buffer) -> Any:
        import torch

        from .reduction import Reduction

        key = (buffer.dtype, buffer.nbytes)
        if key not in self._made:
            self._made.clear()  # one at a time: they are large
            dtype = getattr(torch, buffer.dtype)
            self._made[key] = Reduction([("p", (buffer.nbytes // dtype.itemsize,))], True, dtype)
        return self._made[key]

    def array(self, buffer: Buffer) -> Any:
        return self._reduction(buffer).arrays()[0]

    def bind(self, buffer: Buffer) -> Call:
        return partial(self._reduction(buffer).run, 1)


class _MPI(Contender):
    def __init__(self, name: str, job: Job, piece_bytes: int | None) -> None:
        super().__init__(name, job)
        self._piece_bytes = piece_bytes

    def takes(self, dtype: str, nbytes: int) -> bool:
        if dtype not in ("float32", "float64"):
            self.job.note(f"mpi has no {dtype}")  # not before MPI 5, that is
            return False
        return self._piece_bytes is None or nbytes > self._piece_bytes

    def bind(self, buffer: Buffer) -> Call:
        from mpi4py import MPI

        array = buffer.numeric
        assert array is not None
        mpi_type = {"float32": MPI.FLOAT, "float64": MPI.DOUBLE}[buffer.dtype]
        step = len(array) if self._piece_bytes is None else self._piece_bytes // array.itemsize
        pieces: list[Any] = [[array[i : i + step], mpi_type] for i in range(0, len(array), step)]
        if len(pieces) == 1:
            return partial(self.job.comm.Allreduce, MPI.IN_PLACE, pieces[0], MPI.SUM)

        def run() -> None:
            for piece in pieces:
                self.job.comm.Allreduce(MPI.IN_PLACE, piece, MPI.SUM)

        return run


class _C10d(Contender):
    """torch.distributed, with the backend of a group; None: of the default group."""

    def __init__(self, name: str, job: Job, group: Any = None) -> None:
        super().__init__(name, job)
        self._group = group

    def takes(self, dtype: str, nbytes: int) -> bool:
        return True

    def bind(self, buffer: Buffer) -> Call:
        import torch.distributed as dist

        return partial(dist.all_reduce, buffer.array, group=self._group)

    def bind_all(self, buffers: Sequence[Buffer]) -> Call:
        import torch.distributed as dist

        def run() -> None:
            works = [dist.all_reduce(buffer.array, group=self._group, async_op=True) for buffer in buffers]
            for work in works:
                assert work is not None
                work.wait()

        return run


class _Memcpy(Contender):
    sums = False

    def takes(self, dtype: str, nbytes: int) -> bool:
        return True

    def bind(self, buffer: Buffer) -> Call:
        import numpy as np

        return partial(np.copyto, buffer.spare, buffer.data)


def contenders(job: Job, chosen: Sequence[str]) -> list[Contender]:
    """Ours, and the chosen peers in the order of PEERS; collective. A peer that is not available leaves a note."""
    made: list[Contender] = [_Ours(OURS, job, None)]
    for name in PEERS:
        if name not in chosen:
            continue
        if name == "views":
            made.append(Views(f"{OURS} views", job))
        elif name == "c10d":
            if (group := c10d.group_of_ours(job)) is not None:
                made.append(_C10d(f"{OURS} c10d", job, group))
        elif name == "fp16":
            made.append(_Ours(f"{OURS} fp16", job, "fp16"))
        elif name == "bf16":
            made.append(_Ours(f"{OURS} bf16", job, "bf16"))
        elif name == "mpi":
            made.append(_MPI(name, job, None))
        elif name == "mpi-pieces":
            made.append(_MPI(name, job, _PIECE_BYTES))
        elif name == "gloo":
            if c10d.connect(job):
                made.append(_C10d(name, job))
        else:
            made.append(_Memcpy(name, job))
    return made
