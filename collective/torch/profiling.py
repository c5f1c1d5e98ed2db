"""Ranges of torch.profiler: what this package does in hooks of backward and in step(), and what it waits for.

Their names begin with "collective: ". While no profiler is on in the calling thread they cost a look at that, 0.05 us;
torch's record_function costs 8 us then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .. import handles

__all__ = ["ranged"]

Function = TypeVar("Function", bound=Callable[..., Any])

_is_on: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


def _range(text: str) -> Any:
    return torch.autograd.profiler.record_function(f"collective: {text}")


def ranged(text: Callable[..., str]) -> Callable[[Function], Function]:
    """Make calls of a function ranges; `text` gets the function's arguments."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not _is_on():
                return function(*args, **kwargs)
            with _range(text(*args, **kwargs)):
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


handles.show_waits(_is_on, _range)
