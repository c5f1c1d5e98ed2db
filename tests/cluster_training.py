"""Training on a cluster, as its tests watch it: prints what all steps have made of the weights."""

import sys
import time

import torch

import collective.torch as hvd

hvd.init()
steps, pause = int(sys.argv[1]), float(sys.argv[2])
weights = [torch.nn.Parameter(torch.zeros(1 << 18)) for _ in range(4)]
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(weights, lr=1.0), op=hvd.Sum)
for step in range(steps):
    for number, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, float(hvd.rank() + number))
    optimizer.step()
    if hvd.rank() == 0:
        print("step", step, flush=True)
    time.sleep(pause)
values = [weight.unique().tolist() for weight in weights]
print(f"rank {hvd.rank()}: {values}", flush=True)
