"""`HorovodBasics`, for code that holds the module's functions as an object's methods."""

from __future__ import annotations

from typing import Any

from ... import built, lifecycle, runtime, timeline
from ...submission import Op

__all__ = ["HorovodBasics"]


class HorovodBasics:
    """The life cycle, the topology, what the build can do, and the operators; the arguments, which name an extension,
    have no meaning here.
    """

    init = staticmethod(lifecycle.init)
    shutdown = staticmethod(lifecycle.shutdown)

    def __init__(self, *unused: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        for module in (runtime, built, timeline):
            if name in module.__all__:
                return getattr(module, name)
        if name in Op.__members__:
            return Op[name]
        raise AttributeError(f"HorovodBasics has no {name}")
