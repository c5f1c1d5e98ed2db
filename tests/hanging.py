"""Ranks that hang, each kind in its way, as test_hangs.py has them: python hanging.py KIND

The script of a rank says "has waited" when its wait has ended, and then leaves by itself, so that no job is left over.
"""

import ctypes
import os
import signal
import sys
import time
from typing import NoReturn

import numpy as np

import collective as hvd


def validate() -> NoReturn:
    while True:
        time.sleep(0.05)


def load() -> NoReturn:
    """As a data set whose disk hangs."""
    import queue

    queue.Queue[int]().get()
    raise AssertionError


def wait_for(name: str) -> None:
    hvd.allreduce(np.ones(4, np.float32), name=name)


def train(steps: int, distributed: bool = False) -> None:
    import torch

    import collective.torch as hvd_torch

    torch.manual_seed(0)
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if distributed:
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        optimizer = hvd_torch.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    for step in range(steps):
        if step == 2 and rank == 1:
            validate()
        optimizer.zero_grad()
        model(torch.ones(3, 10)).sum().backward()
        optimizer.step()


def hang(kind: str) -> None:
    if kind == "in a loop":
        validate() if rank == 1 else wait_for("loss")
    elif kind == "in a queue":
        load() if rank == 1 else wait_for("loss")
    elif kind == "after an error":
        try:
            if rank == 1:
                raise ValueError("a bad batch")
            wait_for("loss")
        except ValueError:
            validate()
    elif kind == "stopped" or kind == "rank 0 stopped":
        if rank == (1 if kind == "stopped" else 0):
            os.kill(os.getpid(), signal.SIGSTOP)
        wait_for("loss")
    elif kind == "cut off":
        if rank == 0:
            print("cut me off", flush=True)
        while True:
            wait_for("loss")
    elif kind == "interpreter locked":
        if rank == 1:
            ctypes.PyDLL(None).sleep(60)
        wait_for("loss")
    elif kind == "in MPI":
        from mpi4py import MPI

        if rank == 1:
            MPI.COMM_WORLD.recv(source=0)
        wait_for("loss")
    elif kind == "crosswise":
        wait_for("a" if rank == 0 else "b")
    elif kind == "behind others":
        wait_for("x") if rank == 0 else validate() if rank == 1 else wait_for("y")
    elif kind == "in a bucket":
        train(4)
    elif kind == "in a process set":
        some = hvd.add_process_set([0, 2])
        if rank == 2:
            validate()
        if rank == 0:
            hvd.allreduce(np.ones(4), name="metric", process_set=some)
        hvd.barrier()
    elif kind == "no message":
        x = np.ones(4)
        if rank == 0:
            hvd.recv(x, 1)
        validate()
    elif kind.startswith("torch"):
        import torch
        import torch.distributed as dist

        import collective.torch  # noqa: F401  # the backend

        dist.init_process_group("collective")
        if kind == "torch ddp":
            train(4, distributed=True)
        for step in range(3):
            if rank == 1 and step == 2:
                validate()
            dist.all_reduce(torch.ones(5))
    else:
        raise SystemExit(f"no such kind: {kind}")


hvd.init()
rank = hvd.rank()
wait_for("warm")
try:
    hang(sys.argv[1])
except hvd.CollectiveError as error:
    print(f"rank {rank} has waited: {type(error).__name__}: {error}", flush=True)
    os._exit(3)
