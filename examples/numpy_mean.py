# mpirun -np 2 --bind-to none python examples/numpy_mean.py
"""Mean and variance of data that no rank holds in full, with NumPy alone.

The data: the length of every line in the Python standard library's own sources. Each rank reads every size-th
file, so the shares are uneven, and three small allreduces tell every rank about the whole.
"""

import sys
import sysconfig
from pathlib import Path

import numpy as np

import collective

collective.init()
rank, size = collective.rank(), collective.size()

files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
share = np.array([len(line) for file in files[rank::size] for line in file.read_bytes().splitlines()])

# Counts and sums add up over the ranks; an Average of the ranks' own means would weigh uneven shares alike.
count, total = collective.allreduce(np.array([len(share), share.sum()]), op=collective.Sum, name="sums")
mean = total / count

# The squared deviations from the common mean: a second pass, because E[x^2] - E[x]^2 cancels digits.
squares = collective.allreduce(np.array([np.square(share - mean).sum()]), op=collective.Sum, name="squares")
variance = squares[0] / count

longest = collective.allreduce(np.array([share.max(initial=0)]), op=collective.Max, name="longest")[0]

# The check: an allgather joins the uneven shares, in rank order, and NumPy computes the same from the whole.
everything = collective.allgather(share, name="lines")
counts = collective.allgather(np.array([len(share)]), name="counts")
assert len(everything) == count == counts.sum()
assert everything.max() == longest
np.testing.assert_allclose([mean, variance], [everything.mean(), everything.var()], rtol=1e-12)
assert "torch" not in sys.modules, "collective alone must not import torch"

if rank == 0:
    print(f"lines per rank {counts.tolist()}, longest line {longest} bytes")
    print(f"mean {mean:.6f}  variance {variance:.6f}  of {count} lines on {size} ranks, as from the whole")
