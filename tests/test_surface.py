"""Every public name of horovod.torch is here, and those that ask about the build answer truthfully."""

import pytest

import collective.torch as hvd
from harness.plugin import World

# horovod/torch/__init__.py, without elastic.
HOROVOD = [
    "Adasum",
    "Average",
    "Compression",
    "DistributedOptimizer",
    "HorovodInternalError",
    "Max",
    "Min",
    "ProcessSet",
    "Product",
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
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
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
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "poll",
    "rank",
    "reducescatter",
    "reducescatter_async",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "sparse_allreduce_async",
    "start_timeline",
    "stop_timeline",
    "synchronize",
]


def test_no_public_name_is_missing() -> None:
    assert [name for name in HOROVOD if not hasattr(hvd, name)] == []
    assert [name for name in HOROVOD if name not in hvd.__all__] == []


@pytest.mark.ranks(1)
def test_what_is_built(world: World) -> None:
    assert world.size == 1
    assert hvd.mpi_threads_supported()
    assert hvd.mpi_enabled()
    assert hvd.mpi_built()
    assert not any((hvd.gloo_enabled(), hvd.gloo_built(), hvd.ddl_built(), hvd.ccl_built()))
    assert hvd.cuda_built()
    assert not hvd.rocm_built()
    assert hvd.nccl_built() == 0
