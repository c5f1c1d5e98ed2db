"""How torch.distributed gets a group of this backend."""

from __future__ import annotations

from typing import Any

from ... import lifecycle, runtime
from ...errors import InvalidArgumentError
from .mixed import MixedProcessGroup, other_backends
from .process_group import ProcessGroup

__all__ = ["create"]


def create(options: Any, backend_options: Any = None) -> ProcessGroup:
    """Make a group; collective over its ranks. Called by torch.distributed.

    Raises:
        InvalidArgumentError: torch.distributed and MPI differ about who this process is, or how many there are.
    """
    lifecycle.init()
    state = runtime.current()
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    me = state.topology.rank
    if len(ranks) != options.group_size or max(ranks) >= state.topology.size or ranks[options.group_rank] != me:
        raise InvalidArgumentError(
            f"torch.distributed says that this process is rank {options.group_rank} of {options.group_size} in the "
            f"group {options.group_id!r} of ranks {ranks}, and MPI that it is rank {me} of {state.topology.size}. "
            f"Start the script with mpirun -np {options.group_size} or srun, and leave RANK, WORLD_SIZE, rank= and "
            "world_size= to init_process_group(): they are MPI's."
        )
    is_default = not options.global_ranks_in_group
    label = "default process group" if is_default else f"process group {ranks}"
    place = (options.group_rank, ranks, str(options.group_id), label, options.timeout)
    others = other_backends()
    return MixedProcessGroup(*place, others, options.store) if others else ProcessGroup(*place)
