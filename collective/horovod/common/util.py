"""The helpers of `horovod.common.util` that scripts use."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from ... import built

__all__ = [
    "ccl_built",
    "check_extension",
    "ddl_built",
    "env",
    "extension_available",
    "gloo_built",
    "gpu_available",
    "mpi_built",
    "nccl_built",
    "num_rank_is_power_2",
    "split_list",
]

T = TypeVar("T")


def check_extension(ext_name: str, *unused: object) -> None:
    """Raise ImportError unless the framework is supported: `torch` is, without anything to build."""
    if not extension_available(ext_name):
        raise ImportError(f"{ext_name} is not supported")


def extension_available(ext_base_name: str, verbose: bool = False) -> bool:
    """Whether a framework is supported."""
    return ext_base_name.rpartition(".")[2] == "torch"


def gpu_available(ext_base_name: str, verbose: bool = False) -> bool:
    """Whether the framework sees a device."""
    if not extension_available(ext_base_name):
        return False
    import torch

    return torch.cuda.is_available()


def mpi_built(verbose: bool = False) -> bool:
    """Like the function in `collective.torch`; so are the four below."""
    return built.mpi_built()


def gloo_built(verbose: bool = False) -> bool:
    return built.gloo_built()


def nccl_built(verbose: bool = False) -> int:
    return built.nccl_built()


def ddl_built(verbose: bool = False) -> bool:
    return built.ddl_built()


def ccl_built(verbose: bool = False) -> bool:
    return built.ccl_built()


@contextmanager
def env(**variables: str | None) -> Iterator[None]:
    """Inside this context, environment variables have these values; None leaves one as it is."""
    given = {name: value for name, value in variables.items() if value is not None}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def num_rank_is_power_2(num_rank: int) -> bool:
    """Whether a number is a power of two. (Adasum here takes any number of ranks.)"""
    return num_rank > 0 and num_rank & (num_rank - 1) == 0


def split_list(xs: Sequence[T], num_parts: int) -> list[Sequence[T]]:
    """Cut a list into parts whose lengths differ by at most one, the longer ones first."""
    least, longer = divmod(len(xs), num_parts)
    ends = [number * least + min(number, longer) for number in range(num_parts + 1)]
    return [xs[begin:end] for begin, end in itertools.pairwise(ends) if begin < end]
