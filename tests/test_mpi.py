"""The MPI that runs: how it is named, and what is said where it is not the one this package was built for."""

import subprocess
import sys

import pytest

import collective
from collective import _core, mpi
from harness.mpirun import environment


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("Open MPI v5.0.11, package: Open MPI root@host Distribution, ident: 5.0.11", "Open MPI 5.0.11"),
        ("MPICH Version:      5.0.2\nMPICH Release date: then\n\0", "MPICH 5.0.2"),
        ("Intel(R) MPI Library 2021.14 for Linux* OS\n", "Intel(R) MPI Library 2021.14 for Linux* OS"),
    ],
)
def test_names(said: str, name: str) -> None:
    assert mpi.name_and_version(said) == name


def pretend(monkeypatch: pytest.MonkeyPatch, built: str, runs: str) -> None:
    monkeypatch.setattr(_core, "built_for_mpi", lambda: built)
    monkeypatch.setattr(_core, "running_mpi", lambda: runs)


OPEN_MPI, MPICH = "Open MPI v5.0.11, package: x", "MPICH Version:      5.0.2\nMPICH Device: ch4"


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told with both names and how to install again; relatives with one ABI have numbers that say nothing."""
    for built, runs, told in (
        ("Open MPI 5.0.11", OPEN_MPI, False),
        ("Open MPI 4.1.4", OPEN_MPI, True),
        ("MPICH 5.0.2", MPICH, False),
        ("MPICH 4.2.0", MPICH, True),
        ("MPICH 4.2.0", "Intel(R) MPI Library 2021.14 for Linux* OS", False),
    ):
        pretend(monkeypatch, built, runs)
        said = mpi.other_version()
        assert (said is not None) == told, (built, runs)
        if said is not None:
            assert built in said
            assert mpi.name_and_version(runs) in said
            assert "--no-cache-dir" in said


def test_another_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    for built, runs, loaded in (
        ("Open MPI 5.0.11", OPEN_MPI, MPICH),
        ("MPICH 5.0.2", OPEN_MPI, OPEN_MPI),
        ("Open MPI 5.0.11", MPICH, MPICH),
    ):
        pretend(monkeypatch, built, runs)
        with pytest.raises(collective.MPIMismatchError, match=r"--no-cache-dir") as told:
            mpi._check_same(loaded)
        assert built in str(told.value)
        assert mpi.name_and_version(loaded) in str(told.value)
    pretend(monkeypatch, "Open MPI 4.1.4", OPEN_MPI)
    mpi._check_same(OPEN_MPI)


def test_the_option_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "", OPEN_MPI)
    assert mpi.srun_option() == "--mpi=pmix"
    pretend(monkeypatch, "", MPICH)
    assert mpi.srun_option() == "--mpi=pmi2"


def test_it_is_compared_before_it_is_initialised() -> None:
    """Two MPIs in one process may crash at the start of the second one."""
    code = """
from collective import _core
import collective
_core.built_for_mpi = lambda: "MPICH 5.0.2" if "Open MPI" in _core.running_mpi() else "Open MPI 5.0.11"
try:
    collective.init()
except collective.MPIMismatchError:
    from mpi4py import MPI
    print(MPI.Is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
