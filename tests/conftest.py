"""Tests on real MPI ranks. What a test module needs to know:

    import pytest
    from data import fill
    from harness.mpirun import run_ranks

    @pytest.mark.ranks(1, 2, 3, 4, 7)         # the world sizes the test runs at, one item each: test_sum[np3]
    @pytest.mark.limit(20)                    # seconds until it counts as a hang; 60 unless said
    def test_sum(world): ...                  # runs on every rank; world.rank, world.size, world.comm

    def test_script():                        # unmarked: runs in the plain pytest process, without MPI
        run_ranks(2, "examples/x.py", timeout=60)

Plain `pytest`, with any of its options, starts the ranks itself: see harness/launcher.py. `mpirun -n 3 python -m
pytest` runs the items of world size 3 in the ranks it is given, and leaves out all others and the unmarked
tests: see harness/rank.py.
"""

pytest_plugins = ["harness.plugin"]
