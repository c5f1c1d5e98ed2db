"""Scripts that import horovod and are not to be changed; functions that run on ranks of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import collective
from harness.mpirun import environment, run_ranks
from test_launcher import runs, wait_for

SCRIPT = """
import os
import sys
from horovod import torch as by_from  # before the module is an attribute of the package
import horovod
import horovod.torch as hvd
import horovod.torch.mpi_ops
from horovod.torch.compression import Compression
from horovod.torch.functions import broadcast_object
from horovod.torch.mpi_ops import allreduce_async_, synchronize
from horovod.torch.optimizer import DistributedOptimizer
from horovod.torch.sync_batch_norm import SyncBatchNorm
from horovod.common.basics import HorovodBasics
from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from horovod.common.process_sets import add_process_set, global_process_set, remove_process_set
from horovod.common.util import check_extension, env, gloo_built, gpu_available, mpi_built, split_list
from horovod.runner import run
import torch
import collective.torch

assert by_from is hvd is collective.torch and sys.modules["horovod.torch.mpi_ops"] is collective.torch.mpi_ops
assert horovod.run is run and horovod.__version__.split(".")[:2] == ["0", "28"]
assert gpu_available("torch") == torch.cuda.is_available() and mpi_built() and not gloo_built()
with env(HOME="elsewhere", UNSET_BEFORE="1", LEFT_ALONE=None):
    assert os.environ["HOME"] == "elsewhere" and "UNSET_BEFORE" in os.environ and "LEFT_ALONE" not in os.environ
assert os.environ["HOME"] != "elsewhere" and "UNSET_BEFORE" not in os.environ
assert SyncBatchNorm is hvd.SyncBatchNorm and issubclass(HorovodInternalError, RuntimeError)
assert [list(part) for part in split_list(range(5), 3)] == [[0, 1], [2, 3], [4]]
check_extension("horovod.torch", "HOROVOD_WITH_PYTORCH", __file__, "mpi_lib_v2")
for absent in ("tensorflow", "keras", "tensorflow.keras", "spark", "ray", "mxnet", "torch.elastic", "nothing"):
    package, _, name = f"horovod.{absent}".rpartition(".")
    for statement in (f"import horovod.{absent}", f"from {package} import {name}"):
        try:
            exec(statement)
        except ImportError as error:
            assert "in collective's Horovod interface" in str(error) or absent == "nothing", error
        else:
            raise AssertionError(statement)
try:
    hvd.elastic
except AttributeError as error:
    assert "elastic training is not supported" in str(error), error
else:
    raise AssertionError("elastic")
hvd.init()
basics = HorovodBasics(__file__, "mpi_lib")
assert basics.rank() == hvd.rank() and basics.Max is hvd.Max and basics.init is hvd.init
assert (add_process_set, remove_process_set) == (hvd.add_process_set, hvd.remove_process_set)
model = torch.nn.Linear(2, 1)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), compression=Compression.fp16)
model(torch.full((1, 2), float(hvd.rank()))).sum().backward()
optimizer.step()
total = synchronize(allreduce_async_(torch.ones(2), op=hvd.Sum))
assert broadcast_object(sys.argv[1:], process_set=global_process_set) == ["--lr", "0.1"]
print(__name__, "trained", int(total[0]), Helper)
"""


def test_an_unmodified_script(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("Helper = 'helped'\n")
    (tmp_path / "train.py").write_text("from beside import Helper\n" + SCRIPT)
    for start in (["train.py"], ["-m", "train"]):
        arguments = ["-m", "collective.horovod", *start, "--lr", "0.1"]
        done = run_ranks(2, arguments, 60, cwd=tmp_path)
        assert done.stdout.count("__main__ trained 2 helped") == 2, done.stdout + done.stderr


def test_workers_that_import_the_script_anew(tmp_path: Path) -> None:
    """As those of a DataLoader do where its processes are not forked."""
    (tmp_path / "train.py").write_text("""
import multiprocessing
import horovod.torch as hvd

def worker(number):
    return number, hvd.__name__, hvd.is_initialized()

if __name__ == "__main__":
    hvd.init()
    for method in ("spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(method, pool.map_async(worker, [hvd.size()]).get(timeout=60))
""")
    done = run_ranks(1, ["-m", "collective.horovod", "train.py"], 90, cwd=tmp_path)
    said = [f"{method} [(1, 'collective.torch', False)]" for method in ("spawn", "forkserver")]
    assert done.stdout.splitlines() == said, done.stdout + done.stderr


def test_use_without_a_script() -> None:
    done = run_ranks(1, ["-m", "collective.horovod"], 60)
    assert done.returncode == 1
    assert "usage: python -m collective.horovod" in done.stderr, done.stderr


def on_a_rank(factor: int, add: int = 0) -> tuple[int, int]:
    collective.init()
    return collective.rank(), int(collective.allreduce(collective.rank() * factor, collective.Sum)) + add


def fails_on_rank_1() -> None:
    collective.init()
    if collective.rank() == 1:
        raise ValueError("what went wrong")
    collective.barrier()


def test_run_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    results = collective.run(on_a_rank, (10,), {"add": 1}, np=2)
    assert results == [(0, 11), (1, 11)]
    assert collective.run(lambda: sys.argv is not None) == [True]
    with pytest.raises(collective.CollectiveError, match=r"rank 1 raised(.|\n)*ValueError: what went wrong"):
        collective.run(fails_on_rank_1, np=2)
    # As Horovod's example for MNIST has it.
    assert collective.run(on_a_rank, (3,), np=2, hosts="localhost:2", use_gloo=False, use_mpi=True) == [(0, 3), (1, 3)]
    with pytest.raises(collective.InvalidArgumentError, match=r"run\(min_np=1\) is not possible here"):
        collective.run(on_a_rank, (3,), np=2, min_np=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        collective.run(on_a_rank, (3,), np=2, nonsense=None)
    for wrong in ({"np": 0}, {"np": 2, "num_proc": 2}):
        with pytest.raises(collective.InvalidArgumentError, match="one positive number of ranks"):
            collective.run(on_a_rank, (10,), **wrong)
    with pytest.raises(collective.CollectiveError, match="ended with status"):
        collective.run(on_a_rank, (10,), mpi_args="--no-such-option")


def test_an_interrupt_ends_the_job(tmp_path: Path) -> None:
    """Whether or not the terminal has sent it to mpirun, too."""
    (tmp_path / "job.py").write_text("""
import signal
from pathlib import Path
import collective

def sleeps():
    import os, time
    collective.init()
    unfinished = Path(f"unfinished.{collective.rank()}")
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(f"rank.{collective.rank()}")
    time.sleep(300)

signal.signal(signal.SIGINT, signal.default_int_handler)  # which whoever starts in the background has off
try:
    collective.run(sleeps, np=2)
except KeyboardInterrupt:
    print("interrupted")
""")
    for interrupt in (os.kill, os.killpg):
        process = subprocess.Popen(
            [sys.executable, "job.py"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        files = [tmp_path / f"rank.{rank}" for rank in range(2)]
        wait_for(lambda files=files: all(file.exists() for file in files))
        interrupt(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert stdout == "interrupted\n", stdout + stderr
        assert "RuntimeWarning" not in stderr
        for file in files:
            pid = int(file.read_text())
            wait_for(lambda pid=pid: not runs(pid))
            file.unlink()
