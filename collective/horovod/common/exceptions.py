"""Horovod's exceptions."""

from ...errors import CollectiveError as HorovodInternalError

__all__ = ["HorovodInternalError", "HorovodVersionMismatchError", "HostsUpdatedInterrupt"]


class HostsUpdatedInterrupt(RuntimeError):  # noqa: N818 - Horovod's name
    """Hosts were added or removed; never raised, since jobs are not elastic."""


class HorovodVersionMismatchError(ImportError):
    """Two parts of Horovod differ in version; never raised, since there is one part."""
