"""The pytest plug-in behind the `ranks` marker: one item per world size, and who runs it.

A pytest process is one of three things:
- the launcher: plain `pytest`; runs unmarked tests itself, and has ranks run the others (launcher.py);
- a rank of the launcher's, which gets its orders through a socket (rank.py, OrderedRank);
- a rank under somebody's `mpirun python -m pytest` (rank.py, LockstepRank).

mpi-pytest, from PyPI, was considered: it starts one mpirun per test, which costs 0.3 s for one rank and 3 s for
seven (on 2 cores; more with torch). Here one mpirun serves all tests of a world size.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.items import rank_counts
from harness.job import VARIABLE
from harness.launcher import Launcher
from harness.mpirun import under_mpi
from harness.rank import LockstepRank, OrderedRank, Rank


@pytest.hookimpl(tryfirst=True)  # before pytest decides about temporary directories and JUnit files
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks(*sizes): run on MPI ranks, once at each world size")
    config.addinivalue_line("markers", "limit(seconds): until a test on ranks is a hang (default 60)")
    # Popped, as a process that a test starts is no rank of ours.
    orders = os.environ.pop(VARIABLE, None)
    role: Launcher | Rank
    if orders is not None:
        where = json.loads(orders)
        role = OrderedRank(config, Path(where["directory"]), where["live"])
    elif under_mpi():
        role = LockstepRank(config)
    else:
        role = Launcher(config)
    config.pluginmanager.register(role, "mpi_role")


@pytest.hookimpl(tryfirst=True)  # so that the world size leads the id: test_sum[np2-float32]
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = rank_counts(metafunc.definition)
    if sizes:
        metafunc.fixturenames.append("ranks")  # the test need not ask for it
        metafunc.parametrize("ranks", sizes, ids=[f"np{size}" for size in sizes])


class World:
    """The ranks that run this test, with `collective` initialised on all of them."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD  # to compare results between ranks by other means than those under test

    @property
    def rank(self) -> int:
        import collective

        return int(collective.rank())

    @property
    def size(self) -> int:
        import collective

        return int(collective.size())


@pytest.fixture(scope="session")
def _world(request: pytest.FixtureRequest) -> Iterator[World]:
    if not isinstance(request.config.pluginmanager.get_plugin("mpi_role"), Rank):
        pytest.fail("the fixture `world` is for tests marked with pytest.mark.ranks(...)", pytrace=False)
    import collective

    yield World()
    if collective.is_initialized():
        collective.shutdown()


@pytest.fixture
def world(_world: World) -> World:
    """The world, initialised once for all tests, and again after a test that has shut it down."""
    import collective

    if not collective.is_initialized():
        collective.init()
    return _world
