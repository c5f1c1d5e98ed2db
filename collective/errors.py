"""What can go wrong, one class for each thing that a caller can act on.

Every message says which rank reports or differs, which operation, which tensor, and what is wrong with it.
"""

from __future__ import annotations

__all__ = [
    "CollectiveError",
    "CollectiveTimeoutError",
    "DuplicateNameError",
    "ForkError",
    "GradientChangedError",
    "InternalError",
    "InvalidArgumentError",
    "MPIMismatchError",
    "MismatchError",
    "NotInitializedError",
    "ReplicaError",
    "ShutdownError",
    "UnsupportedTypeError",
]


class CollectiveError(RuntimeError):
    """Base class of all errors of this package."""


class InvalidArgumentError(CollectiveError, ValueError):
    """An argument is wrong on this rank; nothing was submitted, and the runtime goes on."""


class UnsupportedTypeError(CollectiveError, TypeError):
    """An array kind, element type or device that the operation cannot take; nothing was submitted."""


class NotInitializedError(CollectiveError, ValueError):
    """The call needs `init()` before it (Horovod raises ValueError here)."""


class MismatchError(CollectiveError, ValueError):
    """Ranks asked for different things under one name. Raised on every rank; the runtime goes on."""


class DuplicateNameError(CollectiveError, ValueError):
    """An operation of this name is still in flight on this rank; the runtime goes on."""


class CollectiveTimeoutError(CollectiveError, TimeoutError):
    """A rank did not arrive within COLLECTIVE_TIMEOUT; the message names it."""


class ShutdownError(CollectiveError):
    """This rank, or one that the operation needs, has shut down."""


class ForkError(CollectiveError):
    """The runtime was used in a forked child or in a worker process, where MPI must not be called."""


class GradientChangedError(CollectiveError):
    """A gradient changed while it was being reduced in place, so that its value is lost. Raised on every rank."""


class ReplicaError(CollectiveError):
    """Ranks hold different models or optimizer states where they should be equal. Raised on every rank; the runtime
    goes on."""


class InternalError(CollectiveError):
    """MPI failed or an invariant broke; the runtime cannot go on."""


class MPIMismatchError(CollectiveError, ImportError):
    """The engine was built for another MPI than mpi4py loaded, or mpi4py could not load any."""


# By ErrorCode of csrc/base/types.h.
_BY_CODE: dict[int, type[CollectiveError]] = {
    1: InvalidArgumentError,
    2: MismatchError,
    3: DuplicateNameError,
    4: CollectiveTimeoutError,
    5: ShutdownError,
    6: InternalError,
}


def error_class(code: int) -> type[CollectiveError]:
    """The class for an error code of the engine."""
    return _BY_CODE[code]
