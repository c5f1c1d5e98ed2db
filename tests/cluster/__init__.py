"""A cluster on one machine: hosts with names and links of their own, for jobs of several nodes.

    python -m cluster --hosts 2 --ranks 2 --rate 1gbit -- python train.py        (in tests/, as root)

Each host is a network namespace, joined to a switch by a link whose rate `tc tbf` limits in both directions, and a UTS
namespace, so that MPI sees several nodes. Processes and files are shared. Nothing of it touches the machine's own
network, and everything is taken down at the end, also after an error or Ctrl-C.

    host0 ---- rate ---- \
    host1 ---- rate ---- [ switch ]
    host2 ---- rate ---- /
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from harness.mpirun import environment, mpirun_command

__all__ = ["Cluster", "why_not"]

# Of a bucket of tokens: what a host may send at once. Large enough for the kernel's largest segment of 64 KiB.
_BURST = "128kb"
_NETWORK = "10.77.0"


def why_not() -> str:
    """Why this process cannot make one; empty: it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "tc", "unshare") if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)}: not installed (Debian: iproute2, util-linux)"
    probe = f"probe{os.getpid()}"
    try:
        _ip("netns", "add", probe)
    except OSError as error:
        return str(error)
    try:
        _ip("-n", probe, "link", "add", "bridge", "type", "bridge")
        _ip("-n", probe, "link", "add", "one", "type", "veth", "peer", "name", "other")
        _run("tc", "-n", probe, "qdisc", "add", "dev", "one", *_shaped("1gbit"))
    except OSError as error:
        return str(error)
    finally:
        _ip("netns", "del", probe)
    if "Open MPI" not in subprocess.run([mpirun_command()[0], "--version"], capture_output=True, text=True).stdout:
        return "its launcher is Open MPI's"
    return ""


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{shlex.join(command)}: {done.stderr.strip()}")


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _shaped(rate: str) -> tuple[str, ...]:
    return ("root", "tbf", "rate", rate, "burst", _BURST, "latency", "100ms")


class Cluster:
    """Hosts that exist within a `with` statement.

    Args:
        ranks: how many on each host.
        rate: of each host's link, in each direction, as tc has it; None: as fast as the machine goes.
    """

    def __init__(self, ranks: Sequence[int], rate: str | None = "1gbit") -> None:
        self.ranks = list(ranks)
        self.rate = rate
        self._name = f"c{os.getpid()}"
        self._files = tempfile.TemporaryDirectory(prefix="cluster")

    def host(self, number: int) -> str:
        """The name of its network namespace."""
        return f"{self._name}h{number}"

    def address(self, number: int) -> str:
        return f"{_NETWORK}.{number + 1}"

    def __enter__(self) -> Cluster:
        try:
            self._bring_up()
        except BaseException:
            self._take_down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._take_down()

    def _bring_up(self) -> None:
        switch = f"{self._name}s"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number in range(len(self.ranks)):
            host, port = self.host(number), f"port{number}"
            _ip("netns", "add", host)
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", host, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "link", "set", "eth0", "up")
            if self.rate is not None:
                for namespace, device in ((host, "eth0"), (switch, port)):
                    _run("tc", "-n", namespace, "qdisc", "add", "dev", device, *_shaped(self.rate))
        # What mpirun calls in place of ssh, with the address of a host and a command.
        cases = "\n".join(f"{self.address(n)}) h={self.host(n)} n=host{n};;" for n in range(len(self.ranks)))
        self.agent = Path(self._files.name, "agent")
        self.agent.write_text(
            f"#!/bin/sh\ncase $1 in\n{cases}\n*) echo no such host: $1 >&2; exit 1;;\nesac\nshift\n"
            'exec ip netns exec $h unshare --uts sh -c "hostname $n; $*"\n'
        )
        self.agent.chmod(0o755)

    def _take_down(self) -> None:
        names = [f"{self._name}s", *(self.host(number) for number in range(len(self.ranks)))]
        existing = {name for name in names if Path("/run/netns", name).exists()}
        self._kill(existing)
        for name in existing:
            _ip("netns", "del", name)
        self._files.cleanup()

    def _kill(self, namespaces: set[str]) -> None:
        end = time.monotonic() + 10
        while (pids := self._pids(namespaces)) and time.monotonic() < end:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    @staticmethod
    def _pids(namespaces: set[str]) -> list[int]:
        found = []
        for name in namespaces:
            told = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            found += [int(pid) for pid in told.stdout.split()]
        return found

    def command(self, arguments: Sequence[str], options: Sequence[str] = ()) -> list[str]:
        """What starts `arguments` on all ranks, from the first host; options: more of mpirun's."""
        hosts = ",".join(f"{self.address(number)}:{ranks}" for number, ranks in enumerate(self.ranks))
        mpirun = [
            *mpirun_command(),
            *("--host", hosts, "-n", str(sum(self.ranks))),
            *("--prtemca", "plm_ssh_agent", str(self.agent)),
            *options,
        ]
        return self.on_first_host(shlex.join([*mpirun, *arguments]))

    def on_first_host(self, command: str) -> list[str]:
        """What runs a shell's command there, as itself."""
        return ["ip", "netns", "exec", self.host(0), "unshare", "--uts", "sh", "-c", f"hostname host0; exec {command}"]

    def start(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        stdout: int | None = None,
    ) -> subprocess.Popen[str]:
        """Start a job; stdout: where both of its outputs go, None for this process's."""
        # The launcher hands on to other hosts only variables of its own and those that it is told of.
        env = {**environment(), **(env or {})}
        names = [name for name in env if name.startswith(("COLLECTIVE_", "HOROVOD_")) or name in _FORWARDED]
        forwarded = [word for name in names for word in ("-x", name)]
        command = self.command(arguments, [*options, *forwarded])
        return subprocess.Popen(
            command,
            env=env,
            text=True,
            errors="replace",
            start_new_session=True,
            stdout=stdout,
            stderr=stdout and subprocess.STDOUT,
        )

    def cut(self, number: int) -> None:
        """The link of a host loses everything, until it is restored."""
        _ip("-n", self.host(number), "link", "set", "eth0", "down")

    def restore(self, number: int) -> None:
        _ip("-n", self.host(number), "link", "set", "eth0", "up")

    def slow_down(self, number: int, rate: str) -> None:
        """Another rate for what a host sends; the cluster must have been made with one."""
        _run("tc", "-n", self.host(number), "qdisc", "change", "dev", "eth0", *_shaped(rate))

    def processes(self, number: int) -> list[int]:
        """What runs on a host."""
        return self._pids({self.host(number)})

    def bytes_sent(self, number: int) -> int:
        """By the link of a host, since it was made."""
        path = "/sys/class/net/eth0/statistics/tx_bytes"
        told = subprocess.run(["ip", "netns", "exec", self.host(number), "cat", path], capture_output=True, text=True)
        return int(told.stdout)


_FORWARDED = {"OMP_NUM_THREADS", "PYTHONUNBUFFERED", "PYTHONPATH"}
