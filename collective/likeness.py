"""What must be alike on all ranks before they can talk: checked once, by init()."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import _core, version
from .config import Config, LogLevel
from .errors import MismatchError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["check"]


class Build(NamedTuple):
    """What decides how a rank writes its messages."""

    version: str
    byte_order: str
    bits: int

    @classmethod
    def own(cls) -> Build:
        return cls(version.__version__, sys.byteorder, sys.maxsize.bit_length() + 1)

    def __str__(self) -> str:
        return f"collective {self.version} on a {self.bits}-bit {self.byte_order}-endian machine"


def check(comm: MPI.Intracomm, config: Config) -> None:
    """Compare all ranks; collective over `comm`.

    Raises:
        MismatchError: on all ranks, where their versions of this package or their machines' byte orders differ.

    Where a rank other than rank 0 has been given another time-out or fusion threshold than rank 0 uses, rank 0 warns
    that it does not hold: mpirun leaves most of the environment behind on the host where it was started.
    """
    everyone = comm.allgather((socket.gethostname(), Build.own(), config.given()))
    hosts = [host for host, _, _ in everyone]
    if len({build for _, build, _ in everyone}) > 1:
        found = "; ".join(_by_value(hosts, [str(build) for _, build, _ in everyone]))
        raise MismatchError(f"init: the ranks cannot work together: {found}")
    if comm.Get_rank() == 0:
        _warn_of_overruled([given for _, _, given in everyone], hosts, config)
    _core.set_hosts(hosts)  # for texts about ranks


def _warn_of_overruled(everyone: Sequence[dict[str, float]], hosts: Sequence[str], config: Config) -> None:
    for name, holds in config.agreed().items():
        values = [given.get(name, holds) for given in everyone]
        if all(value == holds for value in values):
            continue
        found = "; ".join(_by_value(hosts, [f"{name}={value:g}" for value in values]))
        _core.log(LogLevel.WARNING, f"rank 0's {name} holds for the whole job: {found}")


def _by_value(hosts: Sequence[str], values: Sequence[str]) -> list[str]:
    """ "value: ranks 0-3 (on this host, that host)" for each distinct value."""
    texts = []
    for value in dict.fromkeys(values):
        ranks = [rank for rank, theirs in enumerate(values) if theirs == value]
        where = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
        texts.append(f"{value}: {_core.ranks_text(ranks)} ({where})")
    return texts
