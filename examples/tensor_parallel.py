# mpirun -np 2 python examples/tensor_parallel.py
"""An MLP whose matrices are divided among the ranks, trained in float64 beside the same MLP in one process.

The first matrix is divided by its outputs, the second by its inputs: between them nothing is sent, and one allreduce
in forward and one in backward make the result whole. The ranks need not divide the hidden units evenly.
"""

import argparse
import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import collective.torch  # noqa: F401  # makes the backend known

parser = argparse.ArgumentParser(description="train an MLP with tensor parallelism")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--width", type=int, default=32)
parser.add_argument("--hidden", type=int, default=128)
args = parser.parse_args()


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(args.width, args.hidden), nn.Linear(args.hidden, args.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def difference(a: Tensor, b: Tensor) -> float:
    return (whole(a) - b).abs().max().item()


dist.init_process_group("collective")
rank, size = dist.get_rank(), dist.get_world_size()
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)  # the same weights and data on all ranks
one = MLP()
mesh = init_device_mesh("cpu", (size,))
# As a DTensor, the hidden layer knows its size where the ranks have parts of different sizes.
plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
model = parallelize_module(copy.deepcopy(one), mesh, plan)

optimizers = [torch.optim.Adam(net.parameters(), lr=1e-2) for net in (one, model)]
outputs = gradients = 0.0
for step in range(args.steps):
    x = torch.randn(16, args.width)
    results = []
    for net, optimizer in zip((one, model), optimizers, strict=True):
        optimizer.zero_grad()
        result = net(x)
        (result - x.sin()).square().mean().backward()
        optimizer.step()
        results.append(result.detach())
    outputs = max(outputs, difference(results[1], results[0]))
    pairs = zip(model.parameters(), one.parameters(), strict=True)
    gradients = max([gradients, *(difference(p.grad, expected.grad) for p, expected in pairs)])
    if rank == 0 and step + 1 in (1, args.steps):
        print(f"step {step + 1}  loss {(results[1] - x.sin()).square().mean():.6f}", flush=True)

held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
parts: list[int] = [0] * size
dist.all_gather_object(parts, held)
if rank == 0:
    total = sum(p.numel() for p in one.parameters())
    print(f"parameters held by each of {size} ranks: {', '.join(map(str, parts))} of {total}")
    print(f"greatest difference to one process: outputs {outputs:.1e}, gradients {gradients:.1e}")
dist.destroy_process_group()
