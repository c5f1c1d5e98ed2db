"""The command `collective`: what it starts under each launcher, what it refuses, and how jobs end."""

import importlib
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import collective
from cluster import Cluster, why_not
from collective import _core, mpi
from collective.cli import placement
from collective.cli.main import TOOLS, group
from harness.mpirun import descendants, environment, run_ranks

ROOT = Path(__file__).parents[1]
OPEN_MPI_5 = ("Open MPI v5.0.8, package: x", "mpirun (Open MPI) 5.0.8")
OPEN_MPI_4 = ("Open MPI v4.1.6, package: x", "mpirun (Open MPI) 4.1.6")
MPICH = ("MPICH Version:      4.2.3\n", "HYDRA build details:\n    Version:                                 4.2.3")
INTEL = (
    "Intel(R) MPI Library 2021.13 for Linux* OS\n",
    "Intel(R) MPI Library for Linux* OS, Version 2021.13 Build 20240701 (id: 179630a)",
)
WORD = "collective run: "


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Machine:
    """A machine with this MPI, and these launchers on PATH, two cores, and a user other than root."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.bin, self.patch = directory / "bin", patch
        for name in list(os.environ):
            if name.startswith(("SLURM", "PBS_", "LSB_", "OMPI_", "PRTE_", "COLLECTIVE_", "HOROVOD_", "OMP_")):
                patch.delenv(name)
        for name in ("PYTHONPATH", "LD_LIBRARY_PATH"):
            patch.delenv(name, raising=False)
        executable(self.bin / "train", "#!/bin/sh\n")
        patch.setenv("PATH", f"{self.bin}:/usr/bin:/bin")
        patch.setattr(sys, "executable", str(self.bin / "python"))
        patch.setattr(placement, "physical_cores", lambda: 8)
        patch.setattr(os, "geteuid", lambda: 1000)
        patch.setattr(mpi, "load", lambda: None)  # mpi4py's is the real one
        patch.setattr(_core, "running_mpi_path", lambda: "/nowhere/lib/libmpi.so")

    def has_mpi(self, library: str) -> None:
        self.patch.setattr(_core, "running_mpi", lambda: library)
        self.patch.setattr(_core, "built_for_mpi", lambda: mpi.name_and_version(library))

    def has_launcher(self, says: str, name: str = "mpirun") -> None:
        executable(self.bin / name, f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")

    def has_slurm(self, plugins: str, **variables: str) -> None:
        self.patch.setenv("SLURM_JOB_ID", "7")
        for name, value in variables.items():
            self.patch.setenv(name, value)
        listed = f"echo 'MPI plugin types are... {plugins}' >&2"
        executable(
            self.bin / "srun", f'#!/bin/sh\nif [ "$1" = --version ]; then echo slurm 23.11.4; else {listed}; fi\n'
        )

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(group, ["run", *arguments], prog_name="collective")

    def command(self, *arguments: str) -> str:
        """What --dry-run prints, without the directory of the launchers."""
        result = self.run("--dry-run", *arguments)
        assert result.exit_code == 0, result.output
        assert len(result.stdout.splitlines()) == 1
        assert all(line.startswith(WORD) for line in result.stderr.splitlines())
        return result.stdout.strip().replace(f"{self.bin}/", "")

    def refusal(self, *arguments: str) -> str:
        """The one paragraph that says why nothing is started."""
        result = self.run(*arguments)
        assert result.exit_code == 2, result.output
        assert isinstance(result.exception, SystemExit)
        assert result.stdout == ""
        return result.stderr.splitlines()[-1]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.fixture
def open_mpi(machine: Machine) -> Machine:
    machine.has_mpi(OPEN_MPI_5[0])
    machine.has_launcher(OPEN_MPI_5[1])
    return machine


# ---- what is started, by each launcher ----

HERE = ("-np", "4", "train", "--epochs", "5", "--tag-output")
THERE = ("-np", "4", "-H", "a:2,b:2", "--tag-output", "--output-filename", "out", "train")


@pytest.mark.parametrize(
    ("kind", "here", "there"),
    [
        (
            OPEN_MPI_5,
            "OMP_NUM_THREADS=2 mpirun -np 4 -x OMP_NUM_THREADS -x PATH --bind-to none train --epochs 5 --tag-output",
            "OMP_NUM_THREADS=4 mpirun -np 4 --host a:2,b:2 -x OMP_NUM_THREADS -x PATH --output tag,dir=out "
            "--bind-to none train",
        ),
        (
            OPEN_MPI_4,
            "OMP_NUM_THREADS=2 mpirun -np 4 -x OMP_NUM_THREADS -x PATH --bind-to none train --epochs 5 --tag-output",
            "OMP_NUM_THREADS=4 mpirun -np 4 --host a:2,b:2 -x OMP_NUM_THREADS -x PATH --tag-output "
            "--output-filename out --bind-to none train",
        ),
        (
            MPICH,
            "OMP_NUM_THREADS=2 mpirun -np 4 -genvall train --epochs 5 --tag-output",
            "OMP_NUM_THREADS=4 mpirun -np 4 -hosts a:2,b:2 -genvall -prepend-rank -outfile-pattern out/rank.%r.out "
            "-errfile-pattern out/rank.%r.err train",
        ),
        (
            INTEL,
            "OMP_NUM_THREADS=2 mpirun -np 4 -genvall train --epochs 5 --tag-output",
            "OMP_NUM_THREADS=4 mpirun -np 4 -hosts a,b -ppn 2 -genvall -prepend-rank -outfile-pattern out/rank.%r.out "
            "-errfile-pattern out/rank.%r.err train",
        ),
    ],
    ids=["open_mpi_5", "open_mpi_4", "mpich", "intel"],
)
def test_mpirun(machine: Machine, kind: tuple[str, str], here: str, there: str) -> None:
    machine.has_mpi(kind[0])
    machine.has_launcher(kind[1])
    assert machine.command(*HERE) == here
    assert machine.command(*THERE) == there


@pytest.mark.parametrize(("kind", "plugin"), [(OPEN_MPI_5, "pmix"), (MPICH, "pmi2"), (INTEL, "pmi2")])
def test_srun_in_an_allocation(machine: Machine, kind: tuple[str, str], plugin: str) -> None:
    machine.has_mpi(kind[0])
    machine.has_launcher(kind[1])
    sizes = {"SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "16"}
    machine.has_slurm("none pmi2 pmix pmix_v4", **sizes)
    start = f"srun -n 4 -K --mpi={plugin} --export=ALL"
    assert machine.command("train") == f"OMP_NUM_THREADS=8 {start} --cpu-bind=none train"
    machine.patch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert machine.command("train") == f"OMP_NUM_THREADS=3 {start} --cpus-per-task=3 train"
    assert machine.command(*THERE) == (
        f"OMP_NUM_THREADS=3 {start} --nodelist=a,b --ntasks-per-node=2 --label --output=out/rank.%t.out "
        f"--error=out/rank.%t.err --cpus-per-task=3 train"
    )
    assert machine.command("--launcher", "mpirun", "train").startswith("OMP_NUM_THREADS=3 mpirun -np 4 ")
    assert "--launcher mpirun" in machine.refusal("-H", "a:2,b:1", "train")


def test_an_srun_that_cannot_start_this_mpi(open_mpi: Machine) -> None:
    open_mpi.has_slurm("none pmi2", SLURM_NTASKS="2")
    assert " mpirun -np 2 " in open_mpi.command("train")
    assert "srun has no --mpi=pmix" in open_mpi.run("--dry-run", "train").stderr
    assert "srun has no --mpi=pmix" in open_mpi.refusal("--launcher", "srun", "train")
    (open_mpi.bin / "srun").unlink()
    open_mpi.patch.setenv("PATH", str(open_mpi.bin))  # the machine may have one
    assert "there is no srun on PATH" in open_mpi.refusal("--launcher", "srun", "train")


def test_the_launcher_of_this_mpi_is_found_among_others(machine: Machine) -> None:
    machine.has_mpi(MPICH[0])
    machine.has_launcher(OPEN_MPI_5[1])
    machine.has_launcher(INTEL[1], "mpiexec.hydra")
    assert " mpiexec.hydra -np 2 " in machine.command("-np", "2", "train")  # a relative, with the same ABI
    machine.has_launcher(MPICH[1], "mpirun.mpich")
    assert " mpirun.mpich -np 2 " in machine.command("-np", "2", "train")


def test_unequal_hosts(machine: Machine) -> None:
    machine.has_mpi(INTEL[0])
    machine.has_launcher(INTEL[1])
    assert machine.command("-np", "3", "-H", "a:2,b:4", "train", "x").endswith(
        "mpirun -genvall -host a -n 2 train x : -host b -n 1 train x"
    )


def test_variables(open_mpi: Machine) -> None:
    open_mpi.patch.setenv("HOROVOD_TIMELINE", "t.json")
    open_mpi.patch.setenv("PYTHONPATH", "src")
    open_mpi.patch.setenv("OMP_NUM_THREADS", "1")
    open_mpi.patch.setenv("HOME_OF_DATA", "/data")
    command = open_mpi.command("-np", "2", "-x", "HOME_OF_DATA", "-x", "A=b c", "--log-level", "INFO", "train")
    assert command == (
        "COLLECTIVE_LOG_LEVEL=info A='b c' mpirun -np 2 -x A -x COLLECTIVE_LOG_LEVEL -x HOME_OF_DATA "
        "-x HOROVOD_TIMELINE -x OMP_NUM_THREADS -x PATH -x PYTHONPATH --bind-to none train"
    )
    assert "OMP_NUM_THREADS=1 as given" in open_mpi.run("--dry-run", "-np", "2", "train").stderr
    assert "-x NOT_THERE: there is no such variable" in open_mpi.refusal("-np", "2", "-x", "NOT_THERE", "train")


def test_networks_and_ssh(machine: Machine, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch()
    flags = ("-np", "2", "-p", "2222", "-i", str(key), "--network-interface", "eth0", "train")
    for kind, variables, option in (
        (OPEN_MPI_5, ["PRTE_MCA_plm_ssh_args='-p 2222 -i KEY'", "PRTE_MCA_prte_if_include=eth0"], ""),
        (OPEN_MPI_4, ["OMPI_MCA_plm_rsh_args='-p 2222 -i KEY'", "OMPI_MCA_oob_tcp_if_include=eth0"], ""),
        (MPICH, ["HYDRA_LAUNCHER_EXTRA_ARGS='-p 2222 -i KEY'"], "-iface eth0"),
        (INTEL, ["I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS='-p 2222 -i KEY'"], "-iface eth0"),
    ):
        machine.has_mpi(kind[0])
        machine.has_launcher(kind[1])
        command = machine.command(*flags).replace(str(key), "KEY")
        assert all(f"{variable} " in command for variable in variables)
        assert option in command
    assert "-x FI_PROVIDER=tcp" in machine.refusal("-np", "2", "--tcp", "train")
    assert "only Open MPI's" in machine.refusal("-np", "2", "-prefix-timestamp", "train")


def test_binding(open_mpi: Machine) -> None:
    def options(*flags: str) -> str:
        return open_mpi.command("-np", "2", *flags, "train").partition("-x PATH ")[2]

    assert options("--binding-args", "--bind-to socket") == "--bind-to socket train"
    assert options("--mpi-args", "--map-by slot:PE=4") == "--map-by slot:PE=4 train"
    assert options("--mpi-args", "--mca btl self,tcp") == "--bind-to none --mca btl self,tcp train"
    open_mpi.patch.setenv("PRTE_MCA_hwloc_default_binding_policy", "core")
    assert options() == "train"


# ---- horovodrun's flags ----


def test_flags_become_settings(open_mpi: Machine) -> None:
    flags = ["--fusion-threshold-mb", "0.5", "--timeline-filename", "t.json", "--thread-affinity", "3,7"]
    flags += ["--stall-check-warning-time-seconds", "60", "--stall-check-shutdown-time-seconds", "0"]
    command = open_mpi.command("-np", "2", *flags, "train")
    assert command.startswith(
        "COLLECTIVE_FUSION_THRESHOLD=524288 COLLECTIVE_TIMELINE=t.json COLLECTIVE_STALL_WARNING=60 "
        "COLLECTIVE_TIMEOUT=0 COLLECTIVE_THREAD_AFFINITY=3,7 OMP_NUM_THREADS=4 mpirun"
    )
    assert "COLLECTIVE_STALL_WARNING=0 " in open_mpi.command("-np", "2", "--no-stall-check", "train")


def test_every_flag_of_horovodrun_is_known(open_mpi: Machine) -> None:
    """Accepted, or refused with a reason; none is an unknown option."""
    switches = "--disable-cache --verbose --autotune --no-autotune --timeline-mark-cycles --no-timeline-mark-cycles"
    switches += " --hierarchical-allreduce --no-hierarchical-allreduce --hierarchical-allgather --torus-allreduce"
    switches += " --no-hierarchical-allgather --no-torus-allreduce --stall-check --no-stall-check --mpi"
    switches += " --no-mpi-threads-disable --tcp --log-with-timestamp --log-without-timestamp -prefix-timestamp"
    switches += " --log-hide-timestamp --no-log-hide-timestamp --prefix-output-with-timestamp"
    values = "--start-timeout --network-interfaces --output-filename -p --ssh-port --cycle-time-ms --cache-capacity"
    values += " --autotune-warmup-samples --autotune-steps-per-sample --autotune-bayes-opt-max-samples"
    values += " --autotune-gaussian-process-noise --autotune-log-file --num-nccl-streams --gloo-timeout-seconds"
    open_mpi.command("-np", "2", *switches.split(), *(f"{name}=8" for name in values.split()), "train")
    refused = "--min-np --min-num-proc --max-np --max-num-proc --slots-per-host --elastic-timeout --reset-limit"
    refused += " --host-discovery-script"
    for flag in ("--gloo", "--jsrun", "--mpi-threads-disable", *(f"{name}=8" for name in refused.split())):
        told = open_mpi.refusal("-np", "2", flag, "train")
        assert told.startswith(f"{WORD}{flag.partition('=')[0]}: ")
    assert "cannot grow or shrink" in open_mpi.refusal("--blacklist-cooldown-range", "1", "2", "train")


def test_flags_without_effect_are_named(open_mpi: Machine) -> None:
    told = open_mpi.run("--dry-run", "-np", "2", "--cycle-time-ms", "3", "--autotune", "train").stderr
    assert "without effect here: --cycle-time-ms (there is no cycle); --autotune (" in told


def test_config_file(open_mpi: Machine, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("""
params: {fusion_threshold_mb: 32, cycle_time_ms: 5}
timeline: {filename: t.json, mark_cycles: true}
stall_check: {enabled: false, warning_time_seconds: 120}
library_options: {mpi_threads_disable: false, gloo_timeout_seconds: 60}
logging: {level: INFO, hide_timestamp: true}
""")
    command = open_mpi.command("-np", "2", "--config-file", str(path), "--fusion-threshold-mb", "2", "train")
    assert command.startswith(
        "COLLECTIVE_FUSION_THRESHOLD=2097152 COLLECTIVE_TIMELINE=t.json COLLECTIVE_STALL_WARNING=0 "
        "COLLECTIVE_LOG_LEVEL=info "
    )
    for text, told in (
        ("params: {fusion_treshold_mb: 3}", "params has no 'fusion_treshold_mb', only fusion_threshold_mb"),
        ("parameters: {a: 3}", "'parameters' is no section"),
        ("[1, 2]", "is no section"),
        ("a: [", "cannot be read"),
        ("library_options: {mpi_threads_disable: true}", "--mpi-threads-disable: the engine has a thread"),
        ("params: {fusion_threshold_mb: much}", "'much' is not a valid float"),
    ):
        path.write_text(text)
        assert told in open_mpi.refusal("-np", "2", "--config-file", str(path), "train")
    assert "cannot be read" in open_mpi.refusal("--config-file", str(tmp_path / "none"), "train")


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train"], "-np is missing"),
        (["-np", "2"], "what is to run is missing"),
        (["-np", "0", "train"], "0 is not in the range"),
        (["-np", "2", "--fusion-treshold-mb", "3", "train"], "Did you mean '--fusion-threshold-mb'?"),
        (["-np", "2", "no-such-program"], "there is no program no-such-program on PATH"),
        (["-np", "2", "./no-such-program"], "there is no program ./no-such-program in /"),
        (["-np", "2", "--mpi-args", "'a", "train"], "No closing quotation"),
        (["-np", "2", "--output-filename", "/dev/null/here", "train"], "/dev/null/here: Not a directory"),
        (["-np", "2", "python3", "no_such_script.py"], "there is no script no_such_script.py"),
        (["-np", "2", "python3", "-u", "-X", "dev", "no_such_script.py"], "there is no script no_such_script.py"),
        (["-np", "2", __file__], "put python before it"),
        (["-np", "3", "-H", "a:1,b:1", "train"], "3 ranks do not fit on a:1, b:1, which is 2 slots"),
        (["-np", "9", "train"], "9 ranks on 8 cores"),
        (["-H", "a:2,b:two", "train"], "'b:two' is no host with its slots"),
        (["-H", "a:2", "--hostfile", "x", "train"], "two answers to one question"),
        (["--hostfile", "no_such_file", "train"], "no_such_file cannot be read"),
        (["-np", "2", "-i", "no_such_key", "train"], "there is no file no_such_key"),
    ],
)
def test_wrong_arguments(open_mpi: Machine, arguments: list[str], told: str) -> None:
    assert told in open_mpi.refusal(*arguments)


def test_programs_that_are_no_scripts(open_mpi: Machine) -> None:
    for program in (["-m", "module"], ["-u", "-c", "pass"], ["-"], [__file__, "no_such_argument"]):
        assert " python3 " in open_mpi.command("-np", "2", "python3", *program)


def test_hostfiles(open_mpi: Machine, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two nodes\nnode1 slots=2 max_slots=4\n\nnode2:3  # Hydra's\nnode1\n")
    assert " -np 6 --host node1:3,node2:3 " in open_mpi.command("--hostfile", str(path), "train")
    for text, told in (("node1\nnode2 slot=2\n", "line 2: 'node2 slot=2' is no host"), ("#\n", "names no hosts")):
        path.write_text(text)
        assert told in open_mpi.refusal("-hostfile", str(path), "train")


def test_hosts_that_ssh_does_not_reach(open_mpi: Machine) -> None:
    told = "ssh: Could not resolve hostname b: Name or service not known"
    executable(
        open_mpi.bin / "ssh", f'#!/bin/sh\nfor word; do [ "$word" != b ] || {{ echo "{told}" >&2; exit 255; }}; done\n'
    )
    assert f"ssh does not reach one host of the job (b: {told})" in open_mpi.refusal("-H", "a:1,b:1", "train")
    executable(open_mpi.bin / "ssh", "#!/bin/sh\nexec sleep 60\n")
    start = time.monotonic()
    assert "a: no answer within 1 s" in open_mpi.refusal("-H", "a:1,localhost:1", "--start-timeout", "1", "train")
    assert time.monotonic() - start < 10


def test_more_ranks_than_cores_if_asked_for(open_mpi: Machine) -> None:
    assert " --oversubscribe " in open_mpi.command("-np", "9", "--oversubscribe", "train")
    assert "oversubscribe" not in open_mpi.command("-np", "8", "train")
    open_mpi.patch.setenv("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    assert "--oversubscribe" not in open_mpi.command("-np", "9", "train")


def test_root(open_mpi: Machine) -> None:
    open_mpi.patch.setattr(os, "geteuid", lambda: 0)
    assert "give --allow-run-as-root (or set OMPI_ALLOW_RUN_AS_ROOT=1" in open_mpi.refusal("-np", "2", "train")
    assert " --allow-run-as-root " in open_mpi.command("-np", "2", "--allow-run-as-root", "train")
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        open_mpi.patch.setenv(name, "1")
    assert "--allow-run-as-root" not in open_mpi.command("-np", "2", "train")


def test_no_launcher_or_one_of_another_mpi(machine: Machine) -> None:
    machine.patch.setenv("PATH", str(machine.bin))
    machine.has_mpi(OPEN_MPI_5[0])
    told = machine.refusal("-np", "2", "train")
    assert "the MPI in use is Open MPI 5.0.8" in told
    assert "there is no mpirun beside" in told
    for _, version in (OPEN_MPI_4, MPICH, INTEL):
        machine.has_launcher(version)
        machine.patch.setenv("PATH", f"{machine.bin}:/usr/bin:/bin")  # for the stand-in's own commands
        machine.patch.setattr("collective.mpirun._candidates", lambda *_: iter([f"{machine.bin}/mpirun"]))
        told = machine.refusal("-np", "2", "train")
        assert "the launchers here are of others: " in told
        assert "module load" in told


def test_another_mpi_than_the_engine_was_built_for(open_mpi: Machine) -> None:
    def differ() -> None:
        raise collective.MPIMismatchError("this package was built for A, but mpi4py loaded B")

    open_mpi.patch.setattr(mpi, "load", differ)
    assert open_mpi.refusal("-np", "2", "train") == f"{WORD}this package was built for A, but mpi4py loaded B"


def test_unknown_settings_are_told_once(open_mpi: Machine) -> None:
    open_mpi.patch.setenv("COLLECTIVE_TIMOUT", "3")
    assert "unknown setting COLLECTIVE_TIMOUT" in open_mpi.refusal("-np", "2", "train")


def test_a_rank_starts_no_job(open_mpi: Machine) -> None:
    open_mpi.patch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert "one of several processes already (OMPI_COMM_WORLD_SIZE=2" in open_mpi.refusal("-np", "2", "train")


# ---- jobs ----


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "collective.cli", *arguments]


def job_environment() -> dict[str, str]:
    """More ranks than cores are allowed, in the words of Open MPI 5 and 4."""
    env = environment()
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    return {
        **env,
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }


def run_job(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command_line("run", *arguments),
        env={**job_environment(), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_job() -> None:
    script = """
import os, collective
collective.init()
total = collective.allreduce(collective.rank() + 1, collective.Sum)
names = ("COLLECTIVE_TIMEOUT", "WORDS", "OMP_NUM_THREADS")
print(f"rank {collective.rank()} of {collective.size()}: {total}", *(os.environ[name] for name in names), flush=True)
"""
    flags = ["--stall-check-shutdown-time-seconds", "33", "-x", "WORDS=a b", "--tag-output"]
    done = run_job("-np", "2", *flags, "python", "-c", script)
    assert done.returncode == 0, done.stderr
    lines = sorted(line.strip() for line in done.stdout.splitlines())
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert line.endswith(f"rank {rank} of 2: 3 33 a b 1")
        assert not line.startswith("rank")  # there is a tag before it
    assert sum(line.startswith(WORD) for line in done.stderr.splitlines()) == 2
    assert "\x1b" not in done.stderr


def test_output_in_files(tmp_path: Path) -> None:
    done = run_job("-np", "2", "--output-filename", str(tmp_path / "out"), "python", "-c", "print('here')")
    assert done.returncode == 0, done.stderr
    assert [path.read_text().strip() for path in (tmp_path / "out").rglob("*out") if path.is_file()] == ["here"] * 2


@pytest.mark.parametrize("status", [0, 3])
def test_the_status_is_that_of_the_job(status: int) -> None:
    assert run_job("-np", "2", "python", "-c", f"raise SystemExit({status})").returncode == status


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_job(tmp_path: Path, how: signal.Signals) -> None:
    script = "import os, time; from mpi4py import MPI; open(f'rank{MPI.COMM_WORLD.rank}', 'w'); time.sleep(100)"
    with subprocess.Popen(
        command_line("run", "-np", "2", "python", "-c", script),
        cwd=tmp_path,
        env={**job_environment(), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            wait_for(lambda: len(list(tmp_path.glob("rank?"))) == 2)
            processes = descendants(process.pid)
            assert len(processes) >= 3
            process.send_signal(how)
            assert process.wait(30) != 0
            wait_for(lambda: not any(map(runs, processes)))
        finally:
            process.kill()


COUNTER = """#!{python}
import os, signal, sys, time
count = 0
def interrupted(number, frame):
    global count
    count += 1
signal.signal(signal.SIGINT, interrupted)
open("ready", "w").close()
end = time.monotonic() + 30
while not count and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(count)
"""
FORWARD = """
import os, sys
from collective.cli.forwarding import run_launcher
sys.exit(run_launcher(["./counter"], os.environ))
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_an_interrupt_arrives_once(tmp_path: Path, terminal: bool) -> None:
    """Whether a terminal has sent it, to both processes, or someone to this one alone."""
    executable(tmp_path / "counter", COUNTER.format(python=sys.executable))
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, "-c", FORWARD], {**environment(), "PYTHONPATH": str(ROOT)})
    try:
        wait_for((tmp_path / "ready").exists)
        if terminal:
            os.write(master, b"\x03")
        else:
            os.kill(pid, signal.SIGINT)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(master)
    assert os.waitstatus_to_exitcode(status) == 1


def test_a_launcher_that_is_killed(tmp_path: Path) -> None:
    executable(tmp_path / "counter", "#!/bin/sh\nkill -KILL $$\n")
    done = subprocess.run([sys.executable, "-c", FORWARD], cwd=tmp_path, env={**environment(), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 128 + signal.SIGKILL


SSH = """#!/bin/sh
echo "$*" >> {log}
while :; do case $1 in -[opi]) shift 2;; -*) shift;; *) break;; esac; done
exec {agent} "$@"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_two_hosts(tmp_path: Path) -> None:
    """Hosts that a stand-in for ssh reaches: asked first, then given their ranks and variables."""
    if reason := why_not():
        pytest.skip(reason)
    log = tmp_path / "log"
    with Cluster([1, 1], None) as cluster:
        executable(tmp_path / "ssh", SSH.format(log=log, agent=cluster.agent))
        env = {**job_environment(), "COLLECTIVE_TIMEOUT": "44", "PYTHONPATH": str(ROOT)}
        env["PATH"] = f"{tmp_path}:{env['PATH']}"
        hosts = f"{cluster.address(0)}:1,{cluster.address(1)}:1"
        code = """
import os, socket, collective
collective.init()
total = collective.allreduce(collective.rank() + 1, collective.Sum)
print(f"{socket.gethostname()} {total} {os.environ['COLLECTIVE_TIMEOUT']} {os.environ['WORDS']}\\n", end="", flush=True)
"""
        flags = ["-H", hosts, "-p", "2222", "--network-interface", "eth0", "-x", "WORDS=a b"]
        inner = shlex.join(command_line("run", *flags, sys.executable, "-c", code))
        done = subprocess.run(
            cluster.on_first_host(inner), env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.splitlines()) == ["host0 3 44 a b", "host1 3 44 a b"]
    asked, *started = sorted(log.read_text().splitlines(), key=lambda line: "BatchMode" not in line)
    assert asked.endswith(" true")
    assert any("-p 2222" in line and "prted" in line for line in started)


# ---- the command itself, and the tools ----


def collective_command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command_line(*arguments), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_help_and_version() -> None:
    runner = CliRunner()
    assert (
        runner.invoke(group, ["--version"], prog_name="collective").output == f"collective {collective.__version__}\n"
    )
    listed = runner.invoke(group, ["--help"]).output
    assert all(f"  {tool.name} " in listed for tool in TOOLS)
    told = runner.invoke(group, ["run", "--help"]).output
    assert all(f"\n{title}:\n" in told for title in ("The job", "Hosts", "The launcher", "Output"))
    assert "[default: 8]" in told
    assert "\x1b" not in told


def test_tools_get_their_own_options() -> None:
    for tool in TOOLS:
        assert callable(importlib.import_module(tool.module).main)
        done = collective_command(tool.name, "--help")
        assert done.returncode == 0, done.stderr
        assert "usage: " in done.stdout
    assert collective_command("ucx", "--nonsense").returncode == 2
    assert collective_command("nonsense").returncode == 2


def test_info_on_ranks() -> None:
    done = run_ranks(2, ["-m", "collective.cli", "info"], 60)
    assert done.returncode == 0, done.stderr
    assert "rank  host" in done.stdout


def test_completion() -> None:
    env = {
        **environment(),
        "_COLLECTIVE_COMPLETE": "bash_complete",
        "COMP_WORDS": "collective run --fus",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(command_line(), env=env, capture_output=True, text=True, timeout=60)
    assert "--fusion-threshold-mb" in done.stdout


def test_importing_the_package_does_not_bring_the_command() -> None:
    code = "import sys, collective.torch; assert not {'click', 'yaml', 'collective.cli'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=60)


def test_a_package_that_cannot_be_imported_is_told_in_one_paragraph(tmp_path: Path) -> None:
    package = Path(collective.__file__).parent
    shutil.copytree(package, tmp_path / "collective", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "collective_command.py", tmp_path)
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in f'{f}'.lower()]; "
    done = subprocess.run(
        [sys.executable, "-c", alone + "from collective_command import main; main()"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("collective: ")
    assert "no compiled engine" in done.stderr
    assert len(done.stderr.splitlines()) == 1
