"""The collective operations, over any array.

Names: operations are matched between ranks by name. The n-th unnamed call of an operation on one rank is matched with
the n-th on the others, so unnamed calls must come in the same order everywhere; named ones may come in any order.
"""

from . import movement, reductions
from .movement import *  # noqa: F403
from .reductions import *  # noqa: F403
from .submission import Adasum, Average, Compression, Max, Min, Op, Product, Sum

__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "Max",
    "Min",
    "Op",
    "Product",
    "Sum",
    *movement.__all__,
    *reductions.__all__,
]
