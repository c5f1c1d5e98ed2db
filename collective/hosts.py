"""Where ranks run: hosts with slots, from a list or a file, and whether ssh reaches them."""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import InvalidArgumentError

__all__ = ["Host", "are_reachable", "given", "is_here"]

_AT_ONCE = 32  # ssh processes
_NAME = r"[\w.-]+|\[[0-9A-Fa-f:.]+\]"  # IPv6 addresses in brackets


@dataclass(frozen=True)
class Host:
    name: str
    slots: int

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"


def given(hosts: str | None, hostfile: str | os.PathLike[str] | None) -> list[Host]:
    """The hosts of "a:2,b:2" or of a file; none if neither is given. Without a number, a host has one slot.

    Raises:
        InvalidArgumentError: both, no such file, or what is no host; it names the line.
    """
    if hosts is not None and hostfile is not None:
        raise InvalidArgumentError(f"hosts={hosts} and hostfile={os.fspath(hostfile)} are two answers to one question")
    if hostfile is not None:
        return _of_file(Path(hostfile))
    return [] if hosts is None else _merged([_of_list(part.strip(), hosts) for part in hosts.split(",")])


def _of_list(part: str, hosts: str) -> Host:
    found = re.fullmatch(rf"({_NAME})(?::(\d+))?", part)
    if found is None or found[2] == "0":
        raise InvalidArgumentError(f"hosts={hosts}: {part!r} is no host with its slots, as in node1:2,node2:2")
    return Host(found[1], int(found[2] or 1))


def _of_file(path: Path) -> list[Host]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"hostfile {path} cannot be read: {error}") from None
    hosts = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        # As Open MPI and Horovod have it, or as Hydra does.
        found = re.fullmatch(rf"({_NAME})(?::(\d+)|\s+slots\s*=\s*(\d+))?(?:\s+max[-_]slots\s*=\s*\d+)?", text)
        slots = 0 if found is None else int(found[2] or found[3] or 1)
        if found is None or slots == 0:
            raise InvalidArgumentError(
                f"hostfile {path}, line {number}: {text!r} is no host with its slots, as in: node1 slots=2 (or node1:2)"
            )
        hosts.append(Host(found[1], slots))
    if not hosts:
        raise InvalidArgumentError(f"hostfile {path} names no hosts")
    return _merged(hosts)


def _merged(hosts: Sequence[Host]) -> list[Host]:
    """Each host once: its slots add up, as launchers have it."""
    slots: dict[str, int] = {}
    for host in hosts:
        slots[host.name] = slots.get(host.name, 0) + host.slots
    return [Host(name, count) for name, count in slots.items()]


def is_here(name: str) -> bool:
    """Whether this is a name of the machine that asks, as far as names tell."""
    own = socket.gethostname().partition(".")[0]
    return name in ("localhost", "127.0.0.1", "[::1]") or name.partition(".")[0] == own


def are_reachable(hosts: Sequence[Host], ssh_options: Sequence[str], limit: float) -> None:
    """Raise InvalidArgumentError unless ssh, as the launcher will call it, runs a command on each other host in time.

    Args:
        ssh_options: as in ["-p", "2222"].
        limit: seconds for all of them together.
    """
    others = [host.name for host in hosts if not is_here(host.name)]
    if not others:
        return
    ssh = shutil.which("ssh")
    if ssh is None:
        raise InvalidArgumentError(
            f"ranks on {', '.join(others)} are started by ssh, and there is no ssh on PATH: install it "
            f"(apt-get install openssh-client), or start the job through the cluster's batch system"
        )

    command = [ssh, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, int(limit / 2))}", *ssh_options]

    def complaint(name: str) -> str | None:
        try:
            done = subprocess.run(
                [*command, name.strip("[]"), "true"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return f"{name}: no answer within {limit:g} s"
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return f"{name}: {lines[-1] if lines else f'status {done.returncode}'}" if done.returncode else None

    with concurrent.futures.ThreadPoolExecutor(min(_AT_ONCE, len(others))) as pool:
        complaints = [said for said in pool.map(complaint, others) if said is not None]
    if complaints:
        first = complaints[0].partition(": ")[0]
        raise InvalidArgumentError(
            f"ssh does not reach {'one host' if len(complaints) == 1 else f'{len(complaints)} hosts'} of the job "
            f"({'; '.join(complaints)}). Check the spelling; `ssh {first} true` must work here without a password "
            f"(ssh-copy-id), and Python and this package must be at the same paths there"
        )
