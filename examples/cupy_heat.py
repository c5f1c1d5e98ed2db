# mpirun -np 2 --bind-to none python examples/cupy_heat.py
"""Heat in a rod, by finite differences, with CuPy alone: each rank has a piece of the rod on its GPU.

Neighbours exchange their edges in every step, and an allreduce tells all ranks how much has changed. Ranks need no GPU
each: with fewer of them, they share. The MPI need not be CUDA-aware.
"""

import argparse

import cupy

import collective

parser = argparse.ArgumentParser(description="heat in a rod")
parser.add_argument("--points", type=int, default=1 << 20, help="of each rank's piece")
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

collective.init()
rank, size = collective.rank(), collective.size()
cupy.cuda.Device(collective.local_rank() % cupy.cuda.runtime.getDeviceCount()).use()

rod = cupy.zeros(args.points + 2, dtype=cupy.float32)  # and a point of each neighbour's
if rank == 0:
    rod[:2] = 100.0  # its left end is kept hot
edges = cupy.empty(2, dtype=cupy.float32)
for step in range(1, args.steps + 1):
    # Every rank tells every other its first and last point; two numbers a rank cost what one message does.
    edges[0], edges[1] = rod[1], rod[-2]
    everyone = collective.allgather(edges, name="edges").reshape(size, 2)
    if rank > 0:
        rod[0] = everyone[rank - 1, 1]
    rod[-1] = everyone[rank + 1, 0] if rank + 1 < size else 0.0
    change = 0.25 * (rod[:-2] - 2 * rod[1:-1] + rod[2:])
    rod[1:-1] += change
    if step % 50 == 0:
        most = collective.allreduce(cupy.abs(change).max().reshape(1), collective.Max, name="most")
        heat = collective.allreduce(rod[1:-1].sum(dtype=cupy.float64).reshape(1), collective.Sum, name="heat")
        if rank == 0:
            print(f"step {step}  heat {float(heat[0]):.3f}  largest change {float(most[0]):.5f}")
