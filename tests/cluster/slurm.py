"""Slurm on the hosts of a cluster: its own daemons, from Debian's packages, without systemd and without a file in /etc.

    python -m cluster --slurm --hosts 2 --ranks 4 -- srun -N2 -n4 --mpi=pmix python train.py    (in tests/, as root)

    host0   munged, slurmctld, slurmd, and the commands: srun, sbatch, scancel
    host1   slurmd
    host2   slurmd

Beside its network and its name, each host has a mount namespace with a /tmp of its own: PMIx's folders, which are named
after the job, would collide. All that the daemons write lies in one temporary directory, which hosts see under the same
path, as they do the package and its Python.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from harness.mpirun import environment

from . import Cluster
from . import why_not as why_no_cluster

__all__ = ["Slurm", "why_not"]

# Slurm's plug-in for PMIx opens libpmix.so, a name that only the development package has.
_LIBRARY = "import ctypes; ctypes.CDLL('libpmix.so')"
_PROGRAMS = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client"}
_READY_SECONDS = 60.0
_GPUS = 4

# Processes are found by their parents, as there may be no cgroups to write to; for that plugin's sake, slurmd must
# not look for any either. KillWait is the time from SIGTERM to SIGKILL.
_FILES = {
    "slurm.conf": """
ClusterName=cluster
SlurmctldHost=host0({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={files}/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0
SlurmdParameters=config_overrides
KillWait=10
GresTypes=gpu
PlugStackConfig={files}/plugstack.conf
StateSaveLocation={files}/slurmctld
SlurmctldPidFile={files}/slurmctld/pid
SlurmdSpoolDir={files}/%n/spool
SlurmdPidFile={files}/%n/pid
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
""",
    "cgroup.conf": "CgroupPlugin=cgroup/v1\n",
    "gres.conf": "Name=gpu File={files}/gpu[0-{last_gpu}]\n",
    "etc_hosts": "127.0.0.1 localhost\n{names}\n",
}


def why_not() -> str:
    """Why this process cannot run it; empty: it can."""
    missing = [package for program, package in _PROGRAMS.items() if shutil.which(program) is None]
    if subprocess.run([sys.executable, "-c", _LIBRARY], capture_output=True, check=False).returncode != 0:
        missing.append("libpmix-dev")
    if missing:
        return f"Slurm is not installed (Debian: {', '.join(missing)})"
    return why_no_cluster()


class Slurm(Cluster):
    """A cluster whose hosts run Slurm, within a `with` statement.

    Args:
        cpus: how many Slurm is to count on each host, whatever the machine has. Each host has four GPUs as well, as
            Slurm sees it: null devices.
        rate: as in Cluster.
    """

    def __init__(self, cpus: Sequence[int], rate: str | None = None) -> None:
        super().__init__(cpus, rate)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def files(self) -> Path:
        """A directory that all hosts see."""
        return Path(self._files.name)

    def _bring_up(self) -> None:
        super()._bring_up()
        self._write_files()
        munge = self.files / "munge"
        paths = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        self._start_daemon(0, "munged", "--foreground", *(f"--{name}={munge / at}" for name, at in paths.items()))
        self._wait_until((munge / "socket").exists)
        self._start_daemon(0, "slurmctld", "-D")
        for number in range(len(self.ranks)):
            self._start_daemon(number, "slurmd", "-D")
        self._wait_until(self._is_idle)

    def _take_down(self) -> None:
        for daemon in self._daemons.values():  # they first: one that has just begun is not on its host yet
            daemon.kill()
            daemon.wait()
        super()._take_down()

    def _write_files(self) -> None:
        hosts = range(len(self.ranks))
        self.files.chmod(0o755)  # munged refuses a socket that others cannot reach
        for name in ("munge", "slurmctld", *(f"host{n}/{part}" for n in hosts for part in ("tmp", "spool"))):
            (self.files / name).mkdir(parents=True, mode=0o755)
        key = self.files / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for gpu in range(_GPUS):
            (self.files / f"gpu{gpu}").symlink_to("/dev/null")
        nodes = [f"NodeName=host{n} NodeAddr={self.address(n)} CPUs={self.ranks[n]} Gres=gpu:{_GPUS}" for n in hosts]
        values = {
            "files": self.files,
            "controller": self.address(0),
            "nodes": "\n".join(nodes),
            "names": "\n".join(f"{self.address(n)} host{n}" for n in hosts),
            "last_gpu": _GPUS - 1,
        }
        for name, text in _FILES.items():
            (self.files / name).write_text(text.format(**values))

    def _on_host(self, number: int, command: Sequence[str]) -> list[str]:
        """What runs a command there, in the present directory."""
        tmp = self.files / f"host{number}" / "tmp"
        mounts = [f"mount --bind {self.files}/etc_hosts /etc/hosts"]
        # What lies in the machine's /tmp and is to be seen must be in the host's.
        for path in (self.files, Path(__file__).parents[2], Path(sys.prefix), Path(sys.base_prefix)):
            if path.is_relative_to("/tmp"):
                at = tmp / path.relative_to("/tmp")
                at.mkdir(parents=True, exist_ok=True)
                mounts.append(shlex.join(["mount", "--bind", str(path), str(at)]))
        steps = [f"hostname host{number}", *mounts, f"mount --rbind {tmp} /tmp", shlex.join(["cd", os.getcwd()])]
        namespaces = ["ip", "netns", "exec", self.host(number), "unshare", "--uts", "--mount"]
        return [*namespaces, "sh", "-c", f'{" && ".join(steps)} && exec "$@"', "sh", *command]

    def _environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        told = {**environment(), "PATH": path, "SLURM_CONF": str(self.files / "slurm.conf"), **(env or {})}
        told.pop("TMPDIR", None)  # each host's own
        return told

    def _start_daemon(self, number: int, *command: str) -> None:
        name = f"{command[0]}-host{number}"
        with (self.files / f"{name}.log").open("wb") as log:
            self._daemons[name] = subprocess.Popen(
                self._on_host(number, command),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + _READY_SECONDS
        while not ready():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > end:
                what = f"{', '.join(ended)} ended" if ended else f"Slurm is not ready after {_READY_SECONDS:g} s"
                raise OSError(f"{what}:\n{self.logs()}")
            time.sleep(0.1)

    def _is_idle(self) -> bool:
        return self.ask("sinfo", "--noheader", "--format=%T") == "idle\n"

    def logs(self) -> str:
        """The last lines of each daemon's log."""
        files = sorted(self.files.glob("*.log"))
        return "\n".join("\n".join([file.name, *file.read_text().splitlines()[-10:]]) for file in files)

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints; "" if it fails."""
        done = subprocess.run(
            self._on_host(0, command), env=self._environment(), capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout if done.returncode == 0 else ""

    def start(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        stdout: int | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command on the first host, such as srun; options: more words at its end; stdout as in Cluster."""
        return subprocess.Popen(
            self._on_host(0, [*arguments, *options]),
            env=self._environment(env),
            text=True,
            errors="replace",
            start_new_session=True,
            stdout=stdout,
            stderr=stdout and subprocess.STDOUT,
        )
