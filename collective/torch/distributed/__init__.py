"""torch.distributed over this package: `torch.distributed.init_process_group("collective")` under mpirun or srun.

Importing `collective.torch` registers the backend; torch 2.14 and later find it by its entry point without an import.
What DistributedDataParallel, FSDP2, DTensor, DeviceMesh, distributed checkpoints and the functions of torch.distributed
need then runs on the same engine as Horovod's functions, and both may be used in one program.
"""

from .environment import distributed_environment
from .registration import register

__all__ = ["distributed_environment", "register"]
