"""The helpers of `horovod.common.util` that scripts use."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["check_extension", "extension_available", "num_rank_is_power_2", "split_list"]

T = TypeVar("T")


def check_extension(ext_name: str, *unused: object) -> None:
    """Raise ImportError unless the framework is supported: `torch` is, without anything to build."""
    if not extension_available(ext_name):
        raise ImportError(f"{ext_name} is not supported")


def extension_available(ext_base_name: str, verbose: bool = False) -> bool:
    """Whether a framework is supported."""
    return ext_base_name.rpartition(".")[2] == "torch"


def num_rank_is_power_2(num_rank: int) -> bool:
    """Whether a number is a power of two. (Adasum here takes any number of ranks.)"""
    return num_rank > 0 and num_rank & (num_rank - 1) == 0


def split_list(xs: Sequence[T], num_parts: int) -> list[Sequence[T]]:
    """Cut a list into parts whose lengths differ by one at most, the longer ones first."""
    least, longer = divmod(len(xs), num_parts)
    ends = [number * least + min(number, longer) for number in range(num_parts + 1)]
    return [xs[begin:end] for begin, end in itertools.pairwise(ends) if begin < end]
