"""Horovod's PyTorch interface on this package's engine: `import collective.torch as hvd`."""

from typing import TYPE_CHECKING, Any

from ..built import (
    ccl_built,
    cuda_built,
    ddl_built,
    gloo_built,
    gloo_enabled,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rocm_built,
)
from ..counters import Statistics, statistics
from ..errors import CollectiveError
from ..handles import Handle, Handles
from ..ledger import Straggler, Stragglers, stragglers
from ..lifecycle import add_process_set, init, remove_process_set, shutdown
from ..objects import allgather_object, broadcast_object
from ..preemption import Preemption
from ..process_sets import ProcessSet, global_process_set
from ..running import run
from ..runtime import (
    cross_rank,
    cross_size,
    is_homogeneous,
    is_initialized,
    local_rank,
    local_size,
    rank,
    size,
)
from ..steps import mark_step
from ..submission import Adasum, Average, Max, Min, Product, Sum
from ..timeline import start_timeline, stop_timeline
from ..trace import start_trace, stop_trace
from ..version import __version__ as __version__
from . import _requirements as _requirements  # first, since it says what is wrong with the torch found
from . import compression, distributed, functions, mpi_ops, optimizer, sync_batch_norm
from .compression import Compression, Compressor
from .distributed import distributed_environment
from .ops import (
    allgather,
    allgather_async,
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    alltoall,
    alltoall_async,
    barrier,
    broadcast,
    broadcast_,
    broadcast_async,
    broadcast_async_,
    gather,
    gather_async,
    grouped_allgather,
    grouped_allgather_async,
    grouped_allreduce,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
    grouped_reducescatter,
    grouped_reducescatter_async,
    join,
    poll,
    recv,
    recv_async,
    reduce,
    reduce_async,
    reducescatter,
    reducescatter_async,
    scatter,
    scatter_async,
    send,
    send_async,
    sparse_allreduce_async,
    synchronize,
)
from .optimizer import DistributedOptimizer
from .replicas import ReplicaReport, check_replicas
from .state import broadcast_optimizer_state, broadcast_parameters
from .sync_batch_norm import SyncBatchNorm

# Horovod's base class for errors of the engine.
HorovodInternalError = CollectiveError

__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "Compressor",
    "DistributedOptimizer",
    "Handle",
    "Handles",
    "HorovodInternalError",
    "Max",
    "Min",
    "Preemption",
    "ProcessSet",
    "Product",
    "ReplicaReport",
    "Statistics",
    "Straggler",
    "Stragglers",
    "Sum",
    "SyncBatchNorm",
    "add_process_set",
    "allgather",
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "ccl_built",
    "check_replicas",
    "compression",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "distributed_environment",
    "functions",
    "gather",
    "gather_async",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "local_rank",
    "local_size",
    "mark_step",
    "mpi_built",
    "mpi_enabled",
    "mpi_ops",
    "mpi_threads_supported",
    "nccl_built",
    "optimizer",
    "poll",
    "rank",
    "recv",
    "recv_async",
    "reduce",
    "reduce_async",
    "reducescatter",
    "reducescatter_async",
    "remove_process_set",
    "rocm_built",
    "run",
    "scatter",
    "scatter_async",
    "send",
    "send_async",
    "shutdown",
    "size",
    "sparse_allreduce_async",
    "start_timeline",
    "start_trace",
    "statistics",
    "stop_timeline",
    "stop_trace",
    "stragglers",
    "sync_batch_norm",
    "synchronize",
]

distributed.register()

if not TYPE_CHECKING:  # a type checker would take every attribute to exist

    def __getattr__(name: str) -> Any:
        why = ": elastic training is not supported" if name == "elastic" else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{why}")
