# mpirun -np 2 python examples/pipeline_gpt.py
"""A small transformer in stages, one on each rank: GPipe, by torch.distributed.pipelining.

A batch goes through the stages in microbatches, so that they work at a time. Each rank also trains the whole model by
itself, in float64, to show that the result is the same.
"""

import argparse
import copy
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import collective.torch  # noqa: F401  # makes the backend known

parser = argparse.ArgumentParser(description="train a small transformer in a pipeline of ranks")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--microbatches", type=int, default=4)
args = parser.parse_args()
CONTEXT, WIDTH, HEADS, DEPTH = 32, 32, 4, 4  # bytes, channels, heads, blocks
BATCH, RATE = 8, 4e-3  # windows in a step, learning rate


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.byte, self.position = nn.Embedding(256, WIDTH), nn.Parameter(torch.zeros(CONTEXT, WIDTH))

    def forward(self, windows: Tensor) -> Tensor:
        return self.byte(windows) + self.position


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean, in nats per byte."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


dist.init_process_group("collective")
rank, size = dist.get_rank(), dist.get_world_size()
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)  # the same layers on all ranks, of which each trains some
alone = nn.Sequential(
    Embedding(), *(Block() for _ in range(DEPTH)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
)
share = slice(len(alone) * rank // size, len(alone) * (rank + 1) // size)
mine = copy.deepcopy(alone[share])

stage = PipelineStage(mine, rank, size, torch.device("cpu"))
schedule = ScheduleGPipe(stage, args.microbatches, loss_fn=loss_of)
optimizers = [torch.optim.AdamW(net.parameters(), lr=RATE) for net in (mine, alone)]
files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
for step in range(1, args.steps + 1):
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    windows = text[starts + torch.arange(CONTEXT + 1)].long()
    for optimizer in optimizers:
        optimizer.zero_grad()
    losses: list[Tensor] = []
    inputs = [windows[:, :-1]] if rank == 0 else []
    schedule.step(*inputs, target=windows[:, 1:] if rank == size - 1 else None, losses=losses)
    expected = loss_of(alone(windows[:, :-1]), windows[:, 1:])
    expected.backward()
    for optimizer in optimizers:
        optimizer.step()
    if rank == size - 1 and step in (1, args.steps):  # only the last stage knows the loss
        print(f"step {step}  loss {torch.stack(losses).mean():.6f}, alone {expected:.6f} nats/byte", flush=True)

pairs = zip(mine.parameters(), alone[share].parameters(), strict=True)
difference = torch.stack([(p - expected).abs().max() for p, expected in pairs]).max().detach()
dist.all_reduce(difference, dist.ReduceOp.MAX)
if rank == 0:
    print(f"greatest difference to one process: parameters {difference:.1e}")
dist.destroy_process_group()
