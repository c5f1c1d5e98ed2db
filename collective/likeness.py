"""What must be alike on all ranks before they can talk: settled once, by init()."""

from __future__ import annotations

import dataclasses
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import _core, version
from .config import Config, LogLevel
from .errors import MismatchError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["agree"]


def agree(comm: MPI.Intracomm, config: Config) -> Config:
    """Compare all ranks, and give each the settings of rank 0 that hold for the whole job; collective over `comm`.

    Rank 0 warns where another rank has been given another value: mpirun leaves most of the environment behind on the
    host where it was started, so that only ranks on that host have what was set there.

    Raises:
        MismatchError: on all ranks, where their versions of this package or their machines' byte orders differ.
    """
    # Plain types: those of another version of this package must be readable here.
    everyone = comm.allgather((socket.gethostname(), _build(), config.agreed(), config.given()))
    hosts = [host for host, *_ in everyone]
    builds = [build for _, build, *_ in everyone]
    if len(set(builds)) > 1:
        raise MismatchError(f"init: the ranks cannot work together: {'; '.join(_by_value(hosts, builds))}")
    agreed = everyone[0][2]
    if comm.Get_rank() == 0:
        for name, holds in agreed.items():
            values = [given.get(name, holds) for *_, given in everyone]
            if any(value != holds for value in values):
                found = "; ".join(_by_value(hosts, [f"{name}={value:.17g}" for value in values]))
                _core.log(LogLevel.WARNING, f"rank 0's {name} holds for the whole job: {found}")
    _core.set_hosts(hosts)  # for texts about ranks
    return dataclasses.replace(config, **Config.fields_of(agreed))


def _build() -> str:
    bits = sys.maxsize.bit_length() + 1
    return f"collective {version.__version__} on a {bits}-bit {sys.byteorder}-endian machine"


def _by_value(hosts: Sequence[str], values: Sequence[str]) -> list[str]:
    """ "value: ranks 0-3 (this host, that host)" for each distinct value."""
    texts = []
    for value in dict.fromkeys(values):
        ranks = [rank for rank, theirs in enumerate(values) if theirs == value]
        where = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks))
        texts.append(f"{value}: {_core.ranks_text(ranks)} ({where})")
    return texts
