"""State and objects between ranks, under the name of Horovod's module."""

from ..objects import allgather_object, broadcast_object
from .state import broadcast_optimizer_state, broadcast_parameters

__all__ = ["allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters"]
