"""What the package says, through Python's logging and where a program has set up none."""

from harness.mpirun import run_ranks

LATE = """
import sys, time
import numpy as np
import collective as hvd
hvd.init()
hvd.barrier()
if hvd.rank() == 1:
    time.sleep(1.5)
hvd.allreduce(np.ones(2), name="loss")
"""
LIMITS = {"COLLECTIVE_STALL_WARNING": "0.5"}


def test_a_program_that_logs_gets_the_lines() -> None:
    """With their level, by the logger "collective"; and not a second time on stderr."""
    code = f"""
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(name)s %(levelname)s <%(message)s>")
{LATE}"""
    done = run_ranks(2, ["-c", code], 60, env=LIMITS)
    assert done.returncode == 0, done.stderr
    assert "collective WARNING <rank 0: stalled for " in done.stdout, done.stdout
    assert "stalled for" not in done.stderr


def test_a_program_that_does_not_gets_them_on_stderr() -> None:
    done = run_ranks(2, ["-c", LATE], 60, env=LIMITS)
    assert done.returncode == 0, done.stderr
    assert "[collective] rank 0: stalled for " in done.stderr
    done = run_ranks(2, ["-c", LATE], 60, env={**LIMITS, "COLLECTIVE_LOG_LEVEL": "error"})
    assert done.returncode == 0, done.stderr
    assert "stalled" not in done.stderr


def test_a_handler_that_fails_does_not_end_the_others() -> None:
    code = f"""
import logging, sys
class Bad(logging.Filter):
    def filter(self, record):
        raise ValueError("my filter")
logging.getLogger("collective").addFilter(Bad())
{LATE}
print("done", flush=True)
"""
    done = run_ranks(2, ["-c", code], 60, env=LIMITS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2
    assert "ValueError: my filter" in done.stderr


def test_lines_are_told_while_the_interpreter_is_locked() -> None:
    """By the engine's thread, when it has the next one a second later."""
    code = """
import ctypes, os, threading, time
import numpy as np
from collective import _core, logs
from collective.config import LogLevel
logs.start(LogLevel.WARNING)
_core.queue_log_lines(True)
logs._handing_on.acquire()  # as a handler that does not come back
_core.log(LogLevel.WARNING, "first")
time.sleep(1.2)
_core.log(LogLevel.WARNING, "second")
os._exit(0)
"""
    done = run_ranks(1, ["-c", code], 60)
    assert "[collective] first\n[collective] second" in done.stderr, done.stderr


def test_swapped_calls_are_told_apart_by_their_lines() -> None:
    code = """
import numpy as np
import collective as hvd
hvd.init()
x = np.ones(3)
def first():
    return hvd.allreduce(x)
def second():
    return hvd.allreduce(x)
try:
    if hvd.rank() == 0:
        first(), second()
    else:
        second(), first()
    print("not noticed", flush=True)
except hvd.MismatchError as error:
    print(error, flush=True)
"""
    done = run_ranks(2, ["-c", code], 60)
    assert done.stdout.count("not noticed") == 2, done.stderr
    done = run_ranks(2, ["-c", code], 60, env={"COLLECTIVE_CHECK_CALL_SITES": "1"})
    told = "allreduce 'allreduce.unnamed.0': call site differs: <string>:7 on rank 0; <string>:9 on rank 1"
    assert done.stdout.count(told) == 2, done.stdout + done.stderr
