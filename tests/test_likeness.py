"""What must be alike on all ranks: init() compares it."""

import pytest

from harness.mpirun import run_ranks

SCRIPT = """
import os, sys
import collective
from collective import runtime, version
last = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "2"
{change}
try:
    collective.init()
except collective.MismatchError as error:
    print("refused:", error, flush=True)
else:
    config = runtime.current().config
    print("sum", float(collective.allreduce(1.0, collective.Sum)), config.timeout, config.fusion_threshold, flush=True)
"""


@pytest.mark.parametrize(
    ("change", "first", "last"),
    [
        ('version.__version__ = "9.9" if last else "1.0"', "collective 1.0 on", "collective 9.9 on"),
        ('sys.byteorder = "big" if last else "little"', "little-endian", "big-endian"),
    ],
    ids=["version", "byte order"],
)
def test_ranks_that_cannot_work_together(change: str, first: str, last: str) -> None:
    done = run_ranks(3, ["-c", SCRIPT.format(change=change)], 60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout
    for line in lines:
        assert line.startswith("refused: init: the ranks cannot work together: ")
        assert first in line.split(";")[0]
        assert "ranks 0, 1 (" in line.split(";")[0]
        assert last in line.split(";")[1]
        assert "rank 2 (" in line.split(";")[1]


def test_rank_0s_settings_hold_and_others_are_told() -> None:
    change = 'os.environ["COLLECTIVE_FUSION_THRESHOLD" if last else "COLLECTIVE_TIMEOUT"] = "8388609"'
    done = run_ranks(3, ["-c", SCRIPT.format(change=change)], 60)
    assert done.stdout.split() == ["sum", "3.0", "8388609.0", "8388608"] * 3, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "holds for the whole job" in line]
    assert len(warnings) == 1, done.stderr
    assert "rank 0's COLLECTIVE_FUSION_THRESHOLD" in warnings[0]
    assert "COLLECTIVE_FUSION_THRESHOLD=8388609: rank 2 (" in warnings[0]
