# mpirun -np 2 python examples/moe_alltoall.py
"""A mixture of experts that are dealt to the ranks: tokens travel to their expert and back by all-to-all.

Each rank has tokens of its own and some of the experts; the gate is the same everywhere. Every rank also computes the
layer for all tokens by itself, in float64: outputs and gradients are the same.
"""

import argparse
import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

import collective.torch  # noqa: F401  # makes the backend known

parser = argparse.ArgumentParser(description="a layer of experts on ranks, against one process")
parser.add_argument("--tokens", type=int, default=64, help="of each rank")
parser.add_argument("--width", type=int, default=16)
parser.add_argument("--experts", type=int, default=2, help="of each rank")
args = parser.parse_args()


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(args.width, 2 * args.width), nn.GELU(), nn.Linear(2 * args.width, args.width))


def through(experts: list[nn.Module], tokens: Tensor, choice: Tensor) -> Tensor:
    """Each token through its expert."""
    result = torch.zeros_like(tokens)
    for number, net in enumerate(experts):
        rows = (choice == number).nonzero().squeeze(1)
        result = result.index_copy(0, rows, net(tokens[rows]))
    return result


def exchange(rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
    """Rows for each rank, in order, for rows from each; gradients go the other way."""
    return all_to_all_single_autograd(rows, received, sent, dist.group.WORLD)


dist.init_process_group("collective")
rank, size = dist.get_rank(), dist.get_world_size()
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)  # the same gate, experts and tokens on all ranks, of which each uses its part
gate, every = nn.Linear(args.width, args.experts * size), [expert() for _ in range(args.experts * size)]
own_gate = copy.deepcopy(gate)
own_experts = copy.deepcopy(every[rank * args.experts : (rank + 1) * args.experts])
everything = torch.randn(size * args.tokens, args.width)

# The layer, on this rank's tokens.
tokens = everything.chunk(size)[rank].clone().requires_grad_()
weight, choice = own_gate(tokens).softmax(dim=1).max(dim=1)
order = choice.argsort(stable=True)  # by expert, and so by rank
sent = torch.bincount(choice // args.experts, minlength=size)
received = torch.empty_like(sent)
dist.all_to_all_single(received, sent)  # how many tokens come from each rank
here = torch.empty(int(received.sum()), dtype=torch.int64)
dist.all_to_all_single(here, choice[order], received.tolist(), sent.tolist())  # and which expert each wants
arrived = exchange(tokens[order], received.tolist(), sent.tolist())
returned = exchange(through(own_experts, arrived, here - rank * args.experts), sent.tolist(), received.tolist())
output = torch.zeros_like(tokens).index_copy(0, order, returned) * weight.unsqueeze(1)
output.square().sum().backward()
for p in own_gate.parameters():
    dist.all_reduce(p.grad)  # the gate is everywhere; an expert has the gradients of all ranks already

# The same for all tokens, in one process.
whole = everything.clone().requires_grad_()
weights, choices = gate(whole).softmax(dim=1).max(dim=1)
expected = through(every, whole, choices) * weights.unsqueeze(1)
expected.square().sum().backward()

twins = every[rank * args.experts : (rank + 1) * args.experts]
pairs = [(output, expected.chunk(size)[rank]), (tokens.grad, whole.grad.chunk(size)[rank])]
for net, twin in [(own_gate, gate), *zip(own_experts, twins, strict=True)]:
    pairs += [(p.grad, q.grad) for p, q in zip(net.parameters(), twin.parameters(), strict=True)]
difference = torch.stack([(a - b).abs().max() for a, b in pairs]).max().detach()
dist.all_reduce(difference, dist.ReduceOp.MAX)
moved = (sent.sum() - sent[rank]).reshape(1)
dist.all_reduce(moved)
if rank == 0:
    print(f"{size * args.tokens} tokens, {len(every)} experts on {size} ranks: {moved.item()} tokens went elsewhere")
    print(f"greatest difference to one process: {difference:.1e}")
dist.destroy_process_group()
