"""Test data that shows a mix-up: it differs by rank and by index, and its sums are exact in every dtype."""

import numpy as np
import numpy.typing as npt

PRIME = 19  # sums over 7 ranks stay within +-63 (signed), 126 (unsigned): exact in int8, bfloat16, float16
PERIOD = 65_521  # a prime: past it the values come again, which is as good a test, and made in a fraction of the time


def fill(shape: int | tuple[int, ...], dtype: npt.DTypeLike, rank: int, salt: int = 0) -> npt.NDArray[np.generic]:
    """The array that `rank` contributes: small integers, in [-9, 9], or [0, 18] where dtype is unsigned.

    At each index the values of any two ranks below 19 differ, so that even a single element from the wrong
    rank is seen, and along the index they follow no period that a chunk could have, so that one at the wrong
    place is seen. bool holds their parity. `salt` gives other data for the same rank. The values are exact in
    bfloat16 too (convert from float32).
    """
    count = int(np.prod(shape))
    if count > PERIOD:
        return np.resize(fill(PERIOD, dtype, rank, salt), shape)
    index = np.arange(count, dtype=np.uint64)
    # The mixer of splitmix64 (Steele, Lea and Flood, 2014); the products are meant to wrap.
    mixed = (index + np.uint64(1 + salt * 1_000_003)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(31)
    start, stride = mixed % np.uint64(PRIME), (mixed >> np.uint64(32)) % np.uint64(PRIME - 1) + np.uint64(1)
    values = ((start + np.uint64(rank) * stride) % np.uint64(PRIME)).astype(np.int64)
    kind = np.dtype(dtype).kind
    if kind == "b":
        values %= 2
    elif kind != "u":
        values -= PRIME // 2
    result: npt.NDArray[np.generic] = values.astype(dtype).reshape(shape)
    return result
