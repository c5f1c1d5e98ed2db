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
    alltoall = 5
    reducescatter = 6
    gather = 7
    scatter = 8
    reduce = 9
    refusal = 10
    pair = 11

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
    BitAnd = 6
    BitOr = 7
    BitXor = 8

class Descriptor:
    def __init__(
        self,
        kind: Kind,
        shape: Sequence[int],
        dtype: DType,
        wire: DType,
        op: ReduceOp,
        prescale: float,
        postscale: float,
        root: int,
        device: str,
        layout: str,
    ) -> None: ...

# (rank, host, times last, seconds, operation)
LedgerEntry = tuple[int, str, float, float, str]
# (series, name, operations, entries)
LedgerPart = tuple[int, str, float, list[LedgerEntry]]
# (label, ranks of the group, seconds, parts)
LedgerPage = tuple[str, int, float, list[LedgerPart]]

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
    def given_up(self) -> bool: ...
    @property
    def ledger(self) -> LedgerPage: ...
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
    def __init__(
        self,
        comm: int,
        fusion_threshold: int,
        stall_warning: float,
        timeout: float,
        shared_memory: bool,
        nccl: bool,
        cores: Sequence[int],
    ) -> None: ...
    @property
    def topology(self) -> Topology: ...
    def device_way(self) -> str: ...
    def shares_memory(self) -> bool: ...
    def submit(
        self,
        group: int,
        name: str,
        descriptor: Descriptor,
        source: int,
        target: int,
        splits: Sequence[int],
        recurring: bool,
        caller_waits: bool,
        device: int = -1,
        stream: int = 0,
    ) -> Ticket: ...
    def submit_pair(
        self,
        group: int,
        name: str,
        descriptor: Descriptor,
        sends: bool,
        peer: int,
        tag: int,
        data: int,
        caller_waits: bool,
        device: int = -1,
        stream: int = 0,
    ) -> Ticket: ...
    def submit_join(self, group: int, name: str, streams: Sequence[tuple[int, int]]) -> Ticket: ...
    def add_ordered_group(self, comm: int, label: str, timeout: float) -> int: ...
    def submit_ordered(
        self,
        group: int,
        name: str,
        descriptor: Descriptor,
        source: int,
        target: int,
        splits: Sequence[int],
        rows: Sequence[int],
        expected: Sequence[int],
        caller_waits: bool,
        device: int = -1,
        stream: int = 0,
    ) -> Ticket: ...
    def dismiss_group(self, group: int) -> None: ...
    def wait_for_question(self) -> bool: ...
    def tell_where(self, text: str) -> None: ...
    def report(self, ticket: Ticket) -> bool: ...
    def take_finished(self) -> Ticket | None: ...
    def add_group(self, comm: int) -> int: ...
    def remove_group(self, group: int) -> None: ...
    def wait(self, ticket: Ticket, seconds: float) -> bool: ...
    def waits(self) -> tuple[int, float]: ...
    def ledgers(self) -> list[LedgerPage]: ...
    def ask_ledgers(self) -> list[Ticket]: ...
    def start_timeline(self) -> None: ...
    def stop_timeline(self) -> None: ...
    def take_timeline(self) -> list[tuple[str, str, bool, int, int]]: ...
    def shutdown(self) -> bool: ...
    def describe(self) -> str: ...

class BucketLayout:
    def __init__(self, dtype: DType, wire: DType, counts: Sequence[int], notes: int, device: int) -> None: ...

class BucketOpening:
    @property
    def ticket(self) -> Ticket: ...
    def buckets(self) -> list[Bucket]: ...

def open_buckets(
    engine: Engine,
    group: int,
    name: str,
    layouts: Sequence[BucketLayout],
    dtype: DType,
    wire: DType,
    op: ReduceOp,
    prescale: float,
    postscale: float,
    described: str,
    kind: str,
    device: int,
    stream: int,
) -> BucketOpening: ...

class Bucket:
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def number(self) -> int: ...
    @property
    def on_device(self) -> bool: ...
    def start(self, tensors: Sequence[int], notes: Sequence[int], device: int = -1, stream: int = 0) -> Ticket: ...
    def place(self, tensor: int) -> np.ndarray: ...
    def device_place(self, tensor: int) -> tuple[int, int, object]: ...
    def present(self, i: int) -> bool: ...
    def noted(self, i: int) -> bool: ...
    def fetch(self, targets: Sequence[int], device: int = -1, stream: int = 0) -> None: ...

def queue_convert(
    device: int,
    stream: int,
    to: DType,
    from_: DType,
    pieces: Sequence[tuple[int, int, int]],
    scale: float,
    /,
) -> None: ...
def queue_reduce(
    device: int,
    stream: int,
    dtype: DType,
    op: ReduceOp,
    sources: Sequence[int],
    targets: Sequence[int],
    count: int,
    scale: float,
) -> None: ...
def compute_capability(device: int) -> tuple[int, int]: ...
def load_kernels(device: int, image: bytes) -> None: ...
def load_nccl(files: list[str]) -> None: ...
def do_without_kernels(device: int, why: str) -> None: ...
def set_messages(device: int, why_not: str) -> None: ...

PAIR_TAGS: int

def set_log_level(level: int) -> None: ...
def log(level: int, text: str) -> None: ...
def devices() -> tuple[list[tuple[str, str]], str]: ...
def address_of(array: np.ndarray) -> int: ...
def leak(engine: Engine) -> None: ...
def ranks_text(ranks: list[int]) -> str: ...
def set_hosts(hosts: list[str]) -> None: ...
def meet(comm: int, stall_warning: float, timeout: float) -> None: ...
def built_for_mpi() -> str: ...
def running_mpi() -> str: ...
def running_mpi_path() -> str: ...
def simd_name() -> str: ...
def thresholds() -> list[tuple[str, int, str, str]]: ...
