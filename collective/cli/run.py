"""`collective run`: a job started by the launcher of the MPI in use."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from .. import __version__, config, hosts, job_command, mpi, mpirun
from ..config import Config, Slurm
from ..errors import CollectiveError
from ..hosts import Host
from ..job_command import Job
from ..mpirun import Launcher
from . import horovodrun, placement
from .forwarding import run_launcher
from .options import Problem, SectionedCommand, option

__all__ = ["run"]

Function = TypeVar("Function", bound=Callable[..., Any])
_JOB, _HOSTS, _LAUNCHER, _OUTPUT = "The job", "Hosts", "The launcher", "Output"
# With one of these, hosts are reached by other means than ssh.
_AGENTS = (
    *("OMPI_MCA_plm", "OMPI_MCA_plm_rsh_agent", "PRTE_MCA_plm", "PRTE_MCA_plm_ssh_agent"),
    *("HYDRA_LAUNCHER", "HYDRA_BOOTSTRAP", "I_MPI_HYDRA_BOOTSTRAP", "SLURM_JOB_ID", "PBS_NODEFILE", "LSB_HOSTS"),
)


def _check_build(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked:
        importlib.import_module("collective.info").main([])
        ctx.exit()


def _options(function: Function) -> Function:
    """Declare the flags of the command, horovodrun's among them."""
    for decorate in reversed(
        [
            option(_JOB, "-np", "-n", "--num-proc", "size", type=click.IntRange(min=1), metavar="RANKS",
                   help="How many ranks.  [default: all slots of the hosts, or Slurm's tasks]"),
            option(_JOB, "-x", "exported", multiple=True, metavar="NAME[=VALUE]",
                   help="A variable for all ranks; may be repeated. COLLECTIVE_*, HOROVOD_*, PATH, PYTHONPATH, "
                   "LD_LIBRARY_PATH and OMP_NUM_THREADS are passed on anyway."),
            option(_JOB, "--config-file", type=click.Path(), metavar="FILE", **horovodrun.READ_CONFIG,
                   help="YAML with horovodrun's keys; flags win over it."),
            option(_JOB, "--dry-run", is_flag=True, help="Print the command, and start nothing."),
            option(_HOSTS, "-H", "--hosts", metavar="A:2,B:2", help="Hosts and their slots.  [default: this host]"),
            option(_HOSTS, "-hostfile", "--hostfile", metavar="FILE",
                   help="The same as a file: lines like `node1 slots=2` or `node1:2`."),
            option(_HOSTS, "-p", "--ssh-port", type=click.IntRange(1, 65535), help="Of the hosts' ssh."),
            option(_HOSTS, "-i", "--ssh-identity-file", type=click.Path(), help="The key for ssh."),
            option(_HOSTS, "--start-timeout", type=click.FloatRange(min=1), default=20.0, metavar="SECONDS",
                   show_default=True, help="How long hosts may take to answer ssh."),
            option(_HOSTS, "--network-interfaces", "--network-interface", "interfaces", metavar="A,B",
                   help="The network interfaces to use.  [default: the MPI's choice]"),
            option(_HOSTS, "--tcp", is_flag=True, help="Use TCP only (Open MPI)."),
            option(_LAUNCHER, "--launcher", "which", type=click.Choice(["auto", "mpirun", "srun"]), default="auto",
                   show_default=True, help="auto: srun in a Slurm allocation that can start this MPI, else mpirun."),
            option(_LAUNCHER, "--mpi-args", metavar="ARGS", help='More arguments for it, as in a shell: "--mca ...".'),
            option(_LAUNCHER, "--binding-args", metavar="ARGS",
                   help="How it binds ranks to cores, in place of the choice that is printed."),
            option(_LAUNCHER, "--oversubscribe", is_flag=True, help="Allow more ranks than cores or slots."),
            option(_LAUNCHER, "--allow-run-as-root", is_flag=True, help="Have Open MPI start jobs of root."),
            option(_OUTPUT, "--tag-output", is_flag=True, help="Begin each line with its rank."),
            option(_OUTPUT, "--prefix-output-with-timestamp", "-prefix-timestamp", "timestamps", is_flag=True,
                   help="Begin each line with the time (Open MPI)."),
            option(_OUTPUT, "--output-filename", type=click.Path(file_okay=False), metavar="DIRECTORY",
                   help="Write each rank's output to a file in this directory."),
            option(_OUTPUT, "--verbose", is_flag=True, help="Say also what is checked and passed on."),
            horovodrun.options,
            click.version_option(__version__, "-v", "--version", message="collective %(version)s"),
            click.option("-cb", "--check-build", is_flag=True, is_eager=True, expose_value=False,
                         callback=_check_build, help="Show what `collective info` shows, and exit."),
        ]
    ):  # fmt: skip
        function = decorate(function)
    return function


@click.command(
    cls=SectionedCommand,
    context_settings={"allow_interspersed_args": False},
    epilog="Example: collective run -np 4 -H node1:2,node2:2 python train.py --epochs 5",
)
@_options
@click.argument("program", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(ctx: click.Context, /, **given: Any) -> None:
    """Run PROGRAM on the ranks of a new MPI job.

    The job is started by the launcher of the MPI that this package was built for. Its command is printed, and its exit
    status is this command's.
    """
    horovodrun.refuse(given)
    try:
        status = _run(given)
    except CollectiveError as error:
        raise Problem(str(error)) from None
    ctx.exit(status)


def _run(given: Mapping[str, Any]) -> int:
    _check_program(given["program"])
    _check_alone()
    environment = config.environment()
    changed = {**horovodrun.settings(dict(given)), **_exported(given["exported"], environment)}
    Config.from_environment()  # here once, rather than on every rank
    mpi.load()
    more, binding = _words("--mpi-args", given["mpi_args"]), _words("--binding-args", given["binding_args"])
    places = hosts.given(given["hosts"], given["hostfile"])
    slurm = config.slurm_allocation()
    launcher, why_not_srun = _launcher(given["which"], slurm, environment)
    size = _size(given["size"], places, slurm)
    inherited = {**environment, **changed}
    placement.check_root(launcher, environment, given["allow_run_as_root"], more)
    placement.check_slots(launcher, size, places, environment, given["oversubscribe"], more)
    placed = placement.place(launcher, size, places, slurm, inherited, binding, more)
    if "OMP_NUM_THREADS" not in inherited:
        changed["OMP_NUM_THREADS"] = str(placed.threads)
    job = Job(
        size,
        given["program"],
        hosts=places,
        passed=sorted({*config.of_ranks({**environment, **changed}), *(_name(text) for text in given["exported"])}),
        binding=placed.binding,
        tags=given["tag_output"],
        timestamps=given["timestamps"],
        output=given["output_filename"] or "",
        oversubscribe=given["oversubscribe"],
        as_root=given["allow_run_as_root"],
        interfaces=given["interfaces"] or "",
        tcp=given["tcp"],
        ssh_options=_ssh_options(given),
        more=more,
    )
    command = job_command.command(launcher, job)
    changed |= job_command.variables(launcher, job)
    _say(placed.said + (f"; {why_not_srun}" if why_not_srun else ""))
    if said := horovodrun.ignored(dict(given)):
        _say(said)
    if given["verbose"]:
        _say(f"every rank gets {', '.join(job.passed)}")
    # As a shell takes it: NAME='a b', not 'NAME=a b'.
    shown = " ".join([*(f"{name}={shlex.quote(value)}" for name, value in changed.items()), shlex.join(command)])
    if given["dry_run"]:
        click.echo(shown)
        return 0
    if not (launcher.pmi or any(name in environment for name in _AGENTS) or any("plm" in word for word in more)):
        if given["verbose"] and places:
            _say(f"asking {', '.join(host.name for host in places)} by ssh")
        hosts.are_reachable(places, job.ssh_options, given["start_timeout"])
    if job.output:
        try:
            Path(job.output).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Problem(f"--output-filename {job.output}: {error.strerror}; it names a directory.") from None
    _say(shown)
    return run_launcher(command, {**environment, **changed})


def _say(text: str) -> None:
    click.echo(f"{click.style('collective run:', dim=True)} {text}", err=True)


def _check_program(program: Sequence[str]) -> None:
    if not program:
        raise Problem("what is to run is missing: collective run -np 2 python train.py")
    name, *arguments = program
    if shutil.which(name) is None:
        if name.endswith(".py") and Path(name).is_file():
            raise Problem(f"{name} is not executable: put python before it, as in: python {shlex.join(program)}")
        raise Problem(f"there is no program {name} {f'in {os.getcwd()}' if '/' in name else 'on PATH'}.")
    script = _script(arguments) if Path(name).name.startswith("python") else None
    if script is not None and not Path(script).exists():
        raise Problem(f"there is no script {script} in {os.getcwd()}.")


def _script(arguments: Sequence[str]) -> str | None:
    """What Python would run; None: a module, a command, or standard input."""
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            return word
        if word == "-" or word.startswith(("-m", "-c")):
            return None
        if word in ("-W", "-X"):  # with a value
            next(words, None)
    return None


def _check_alone() -> None:
    if (found := config.launched()) is not None:
        raise Problem(
            f"this is one of several processes already ({found.variable}={found.value}, by {found.launcher}), and each "
            f"would start a job. Start the script itself by that launcher, or `collective run` without it."
        )


def _words(flag: str, text: str | None) -> list[str]:
    """The arguments in the value of a flag."""
    try:
        return shlex.split(text or "")
    except ValueError as error:
        raise Problem(f"{flag} {text!r}: {error}; it is read as a shell reads words.") from None


def _name(text: str) -> str:
    return text.partition("=")[0]


def _exported(exported: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that -x sets; those without a value must be there."""
    for text in exported:
        if not _name(text) or ("=" not in text and text not in environment):
            raise Problem(f"-x {text}: there is no such variable; -x NAME=VALUE sets one.")
    return {_name(text): text.partition("=")[2] for text in exported if "=" in text}


def _launcher(which: str, slurm: Slurm | None, environment: Mapping[str, str]) -> tuple[Launcher, str]:
    """The launcher, and why it is not srun where that was to be expected."""
    why = ""
    if which == "srun" or (which == "auto" and slurm is not None):
        srun, why = mpirun.find_srun(environment)
        if srun is not None:
            return srun, ""
        if which == "srun":
            raise Problem(f"{why}; --launcher mpirun starts the job without it.")
        why = f"not by srun: {why}"
    return mpirun.find(sys.executable, environment), why


def _size(size: int | None, places: Sequence[Host], slurm: Slurm | None) -> int:
    if size is not None:
        return size
    if places:
        return sum(host.slots for host in places)
    if slurm is not None and slurm.ranks is not None:
        return slurm.ranks
    raise Problem("how many ranks? -np is missing: collective run -np 2 python train.py")


def _ssh_options(given: Mapping[str, Any]) -> list[str]:
    port, key = given["ssh_port"], given["ssh_identity_file"]
    if key is not None and not Path(key).is_file():
        raise Problem(f"--ssh-identity-file: there is no file {key}.")
    return [*(["-p", str(port)] if port is not None else []), *(["-i", key] if key is not None else [])]
