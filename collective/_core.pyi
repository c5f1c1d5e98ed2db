"""The engine, compiled from csrc/ (bindings.cc)."""

from collections.abc import Sequence
from enum import Enum

import numpy as np
import numpy.typing as npt

class Kind(Enum):
    allreduce = 0
    broadcast = 1
    allgather = 2
    barrier = 3
    channel = 4

class DType(Enum):
    uint8 = 0
    int8 = 1
    uint16 = 2
    int16 = 3
    int32 = 4
    int64 = 5
    float16 = 6
    bfloat16 = 7
    float32 = 8
    float64 = 9
    complex64 = 10
    complex128 = 11
    bool = 12

class ReduceOp(Enum):
    Average = 0
    Sum = 1
    Adasum = 2
    Min = 3
    Max = 4
    Product = 5

class Ticket:
    @property
    def done(self) -> bool: ...
    @property
    def name(self) -> str: ...
    @property
    def code(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def channel(self) -> int: ...
    @property
    def rows(self) -> list[int]: ...
    def take_output(self, nbytes: int) -> npt.NDArray[np.uint8]: ...

class Topology:
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    homogeneous: bool

class Engine:
    def __init__(self, comm: int, fusion_threshold: int, stall_warning: float, timeout: float) -> None: ...
    @property
    def topology(self) -> Topology: ...
    def submit(
        self,
        kind: Kind,
        name: str,
        shape: Sequence[int],
        dtype: DType,
        wire: DType,
        op: ReduceOp,
        prescale: float,
        postscale: float,
        root: int,
        device: str,
        layout: str,
        source: int,
        target: int,
        recurring: bool,
        caller_waits: bool,
    ) -> Ticket: ...
    def wait(self, ticket: Ticket, seconds: float) -> bool: ...
    def shutdown(self) -> bool: ...
    def describe(self) -> str: ...

class Bucket:
    def __init__(
        self,
        engine: Engine,
        name: str,
        channel: int,
        dtype: DType,
        wire: DType,
        op: ReduceOp,
        prescale: float,
        postscale: float,
        counts: Sequence[int],
        notes: int,
    ) -> None: ...
    def start(self, tensors: Sequence[int], notes: Sequence[int]) -> Ticket: ...
    def present(self, i: int) -> bool: ...
    def noted(self, i: int) -> bool: ...
    def fetch(self, targets: Sequence[int]) -> None: ...

def leak(engine: Engine) -> None: ...
def built_for_mpi() -> str: ...
def running_mpi() -> str: ...
def running_mpi_path() -> str: ...
def simd_name() -> str: ...
