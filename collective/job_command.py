"""A job in the words of its launcher.

| | Open MPI | MPICH, Intel MPI | srun |
|---|---|---|---|
| ranks | -np | -np | -n |
| hosts | --host a:2,b:2 | -hosts a:2,b:2; Intel -hosts a,b -ppn 2 | --nodelist=a,b --ntasks-per-node=2 |
| variables | -x, one by one | -genvall | --export=ALL |
| whose output | --tag-output; 5: --output tag | -prepend-rank | --label |
| output to files | --output-filename; 5: --output dir= | -outfile-pattern, -errfile-pattern | --output=, --error= |
| cores | --bind-to none | as they do by themselves | --cpus-per-task, or --cpu-bind=none |

srun ends the job when a rank fails if it is told to (-K), the others do so by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import InvalidArgumentError
from .hosts import Host
from .mpirun import Kind, Launcher

__all__ = ["Job", "command", "variables"]


@dataclass(frozen=True)
class Job:
    """What is to be started."""

    size: int
    program: Sequence[str]
    hosts: Sequence[Host] = ()  # none: this one, or those that the batch system has granted
    passed: Sequence[str] = ()  # the variables that launchers pass on only if told; the environment has their values
    binding: Sequence[str] = ()  # as the launcher has it
    tags: bool = False  # lines of output begin with their rank
    timestamps: bool = False
    output: str = ""  # a directory for a file per rank
    oversubscribe: bool = False
    as_root: bool = False
    interfaces: str = ""  # network interfaces, "eth0,eth1"
    tcp: bool = False
    ssh_options: Sequence[str] = ()
    more: Sequence[str] = ()  # arguments for the launcher


def command(launcher: Launcher, job: Job) -> list[str]:
    """The command, to be started with `variables` in its environment.

    Raises:
        InvalidArgumentError: this launcher cannot do it; it says what else can.
    """
    if launcher.kind.is_open_mpi:
        options = _open_mpi(launcher.kind, job)
    elif launcher.kind.is_hydra:
        options = _hydra(launcher, job)
    else:
        options = _srun(launcher, job)
    ranks = [launcher.path, "-n" if launcher.kind is Kind.SRUN else "-np", str(job.size)]
    start = [*ranks, *options, *job.binding, *job.more]
    if launcher.kind is Kind.INTEL and len({host.slots for host in job.hosts}) > 1:
        return _sections(start, job)
    return [*start, *job.program]


def variables(launcher: Launcher, job: Job) -> dict[str, str]:
    """What the launcher reads from its environment."""
    ssh = " ".join(job.ssh_options)
    found: dict[str, str] = {}
    if launcher.kind.is_open_mpi or launcher.pmi == "--mpi=pmix":
        if ssh:
            found |= {"OMPI_MCA_plm_rsh_args": ssh, "PRTE_MCA_plm_ssh_args": ssh}
        if job.interfaces:
            found["OMPI_MCA_btl_tcp_if_include"] = job.interfaces
            is_5 = launcher.kind is Kind.OPEN_MPI_5
            found["PRTE_MCA_prte_if_include" if is_5 else "OMPI_MCA_oob_tcp_if_include"] = job.interfaces
        if job.tcp:
            found |= {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,tcp"}
    elif job.tcp:
        raise InvalidArgumentError(
            f"--tcp is for Open MPI. {launcher} takes it from the variables of the MPI's network library: "
            f"-x FI_PROVIDER=tcp (libfabric), -x UCX_TLS=tcp,self (UCX)"
        )
    if launcher.kind.is_hydra and ssh:
        name = "HYDRA_LAUNCHER_EXTRA_ARGS" if launcher.kind is Kind.MPICH else "I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS"
        found[name] = ssh
    return found


def _open_mpi(kind: Kind, job: Job) -> list[str]:
    options = ["--host", ",".join(map(str, job.hosts))] if job.hosts else []
    for name in job.passed:
        options += ["-x", name]
    if kind is Kind.OPEN_MPI_5:
        wanted = {"tag": job.tags, "timestamp": job.timestamps, f"dir={job.output}": bool(job.output)}
        if any(wanted.values()):
            options += ["--output", ",".join(what for what, asked in wanted.items() if asked)]
    else:
        options += ["--tag-output"] * job.tags + ["--timestamp-output"] * job.timestamps
        options += ["--output-filename", job.output] if job.output else []
    return options + ["--oversubscribe"] * job.oversubscribe + ["--allow-run-as-root"] * job.as_root


def _hydra(launcher: Launcher, job: Job) -> list[str]:
    options = ["-genvall"]
    slots = {host.slots for host in job.hosts}
    if job.hosts and launcher.kind is Kind.MPICH:
        options = ["-hosts", ",".join(map(str, job.hosts)), *options]
    elif len(slots) == 1:
        options = ["-hosts", ",".join(host.name for host in job.hosts), "-ppn", str(slots.pop()), *options]
    _refuse_timestamps(launcher, job)
    options += ["-prepend-rank"] * job.tags
    if job.output:
        options += ["-outfile-pattern", f"{job.output}/rank.%r.out", "-errfile-pattern", f"{job.output}/rank.%r.err"]
    return options + (["-iface", job.interfaces] if job.interfaces else [])


def _sections(start: list[str], job: Job) -> list[str]:
    """Intel MPI has one number of ranks per host for all hosts; otherwise each host gets a section of its own."""
    launcher, _, _, *options = start
    words, left = [launcher, *options], job.size
    for host in job.hosts:
        count = min(host.slots, left)
        if count > 0:
            words += [*([":"] if left < job.size else []), "-host", host.name, "-n", str(count), *job.program]
            left -= count
    if left:
        raise InvalidArgumentError(f"Intel MPI's launcher needs a slot for each rank: {left} more than there are")
    return words


def _srun(launcher: Launcher, job: Job) -> list[str]:
    options = ["-K", launcher.pmi, "--export=ALL"]
    if job.hosts:
        slots = {host.slots for host in job.hosts}
        if len(slots) > 1:
            raise InvalidArgumentError(
                "srun takes one number of ranks for all nodes: give all hosts equal slots, or --launcher mpirun"
            )
        options += [f"--nodelist={','.join(host.name for host in job.hosts)}", f"--ntasks-per-node={slots.pop()}"]
    _refuse_timestamps(launcher, job)
    if job.interfaces and launcher.pmi != "--mpi=pmix":
        raise InvalidArgumentError(
            "under srun, MPICH and Intel MPI take no option for network interfaces: -x FI_TCP_IFACE=... (libfabric) or "
            "-x UCX_NET_DEVICES=... (UCX)"
        )
    options += ["--label"] * job.tags + ["--overcommit"] * job.oversubscribe
    return options + ([f"--output={job.output}/rank.%t.out", f"--error={job.output}/rank.%t.err"] if job.output else [])


def _refuse_timestamps(launcher: Launcher, job: Job) -> None:
    if job.timestamps:
        raise InvalidArgumentError(
            f"{launcher} puts no time before lines of output; only Open MPI's mpirun does. --tag-output names the rank"
        )
