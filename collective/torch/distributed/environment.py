"""What torch.distributed asks of its environment, told by MPI: ranks, hosts, a store."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

from ... import addresses, config, lifecycle, runtime
from ...errors import InvalidArgumentError

__all__ = ["distributed_environment", "open_store"]


def distributed_environment() -> dict[str, str]:
    """Set what torchrun would set, from MPI; collective over all ranks, and calls `init()` if that is not done.

    For code that insists on `env://`, or for another backend, such as NCCL, under mpirun or srun. The port is one that
    was free on rank 0's host at the time of the call. Variables that are set already are overwritten; except
    GLOO_SOCKET_IFNAME, which becomes the interface by which this host reaches rank 0's unless it is set, since gloo
    would look up the host's name, which may lead nowhere.

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR and MASTER_PORT, as set.

    Raises:
        InvalidArgumentError: on all ranks, where not every node reaches an IPv4 address of rank 0's.
    """
    lifecycle.init()
    state = runtime.current()
    place = state.topology
    found = _find()
    port = 0
    if place.rank == 0:
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
    values = {
        "RANK": place.rank,
        "WORLD_SIZE": place.size,
        "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": place.local_size,
        "GROUP_RANK": place.cross_rank,
        "MASTER_ADDR": found.address,
        "MASTER_PORT": state.comm.bcast(port),
    }
    texts = {name: str(value) for name, value in values.items()}
    config.tell_torch(texts, found.interface)
    return texts


def open_store(timeout: timedelta) -> Any:
    """The store by which torch's own parts talk to each other, held by rank 0; collective over all ranks."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not here where torch was built without it

    state = runtime.current()
    place = state.topology
    address = _find().address
    if place.rank > 0:
        port = state.comm.bcast(None)
        return TCPStore(address, port, place.size, is_master=False, timeout=timeout)
    store = TCPStore(address, 0, place.size, is_master=True, timeout=timeout, wait_for_workers=False)
    state.comm.bcast(store.port)
    return store


def _find() -> addresses.Found:
    """How all nodes reach rank 0."""
    state = runtime.current()
    found = addresses.find(state.comm, state.topology.local_size)
    if found is None:
        raise InvalidArgumentError(
            f"rank {state.topology.rank}: torch.distributed needs a TCP connection from every rank to rank 0, and not "
            "every node reaches an IPv4 address of its host (GLOO_SOCKET_IFNAME, if it is set, names the only "
            "interface that is tried)"
        )
    return found
