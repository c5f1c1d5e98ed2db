"""Under which address the other nodes reach rank 0, and through which of their interfaces."""

from __future__ import annotations

import fcntl
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import gloo_interface

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Found", "find"]

_SIOCGIFADDR = 0x8915  # Linux's request for an interface's IPv4 address, and where in the answer it stands
_ADDRESS = slice(20, 24)
_SECONDS = 2.0  # for a connection


@dataclass(frozen=True)
class Found:
    """What rank 0 and this rank need."""

    address: str
    """Of rank 0."""
    interface: str
    """Of this rank's host, on the way to that address."""
    own: str
    """This rank's own address there."""


def find(comm: MPI.Intracomm, local_size: int) -> Found | None:
    """Try all addresses of rank 0 from all ranks of `comm`; None if not all can connect to one of them. Collective.

    On one node it is the loopback's. GLOO_SOCKET_IFNAME, if it is set, names the only interface to be tried.
    """
    if local_size == comm.Get_size():
        return Found("127.0.0.1", "lo", "127.0.0.1")
    with socket.socket() as listener:
        offered = None
        if comm.Get_rank() == 0:
            listener.bind(("", 0))
            listener.listen(comm.Get_size())
            wanted = gloo_interface()
            own = [address for name, address in _interfaces() if name != "lo" and wanted in (None, name)]
            offered = (listener.getsockname()[1], own)
        port, candidates = comm.bcast(offered)
        ways = {address: _interface_to(address, port) for address in candidates}
        everyone = comm.allgather([address for address, way in ways.items() if way])
    for address in candidates:
        way = ways[address]
        if way and all(address in reached for reached in everyone):
            return Found(address, *way)
    return None


def _interfaces() -> list[tuple[str, str]]:
    """Names and IPv4 addresses of those that have one."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, request)
            except OSError:  # it has none
                continue
            found.append((name, socket.inet_ntoa(answer[_ADDRESS])))
    return found


def _interface_to(address: str, port: int) -> tuple[str, str] | None:
    """That of this host from which a connection goes, also to the host itself, with its address; None if there is no
    connection."""
    try:
        with socket.create_connection((address, port), _SECONDS) as connection:
            source = connection.getsockname()[0]
    except OSError:
        return None
    return next(((name, own) for name, own in _interfaces() if own == source), None)
