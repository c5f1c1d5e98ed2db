"""The operations, and everything else in Horovod's module of this name."""

from .. import built, runtime
from ..built import *  # noqa: F403
from ..lifecycle import init, shutdown
from ..process_sets import global_process_set
from ..runtime import *  # noqa: F403
from ..submission import Adasum, Average, Max, Min, Product, Sum
from ..timeline import start_timeline, stop_timeline
from . import ops
from .ops import *  # noqa: F403

__all__ = [
    "Adasum",
    "Average",
    "Max",
    "Min",
    "Product",
    "Sum",
    "global_process_set",
    "init",
    "shutdown",
    "start_timeline",
    "stop_timeline",
    *built.__all__,
    *ops.__all__,
    *runtime.__all__,
]
