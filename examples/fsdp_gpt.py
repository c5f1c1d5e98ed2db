# mpirun -np 2 python examples/fsdp_gpt.py --steps 100
"""Trains a small transformer on Python's own sources with FSDP2: each rank holds a part of every parameter.

The ranks divide one batch, whatever their number, in float64: the losses are those of one process (-np 1). Checkpoints
are made by torch.distributed.checkpoint; --resume goes on from the last one, on as many ranks as you like.
"""

import argparse
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import collective.torch  # noqa: F401  # makes the backend known

parser = argparse.ArgumentParser(description="train a small transformer with FSDP2")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/fsdp_gpt"), help="a directory")
parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
args = parser.parse_args()
CONTEXT, WIDTH, HEADS, DEPTH = 64, 36, 4, 2  # bytes, channels, heads, blocks
BATCH, RATE = 12, 4e-3  # windows in a step, over all ranks; learning rate


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


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.byte, self.position = nn.Embedding(256, WIDTH), nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False))

    def forward(self, windows: Tensor) -> Tensor:
        """The mean loss, in nats, of predicting each byte of a window from those before it."""
        logits = self.head(self.blocks(self.byte(windows[:, :-1]) + self.position))
        return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


dist.init_process_group("collective")
rank, size = dist.get_rank(), dist.get_world_size()
assert BATCH % size == 0, f"{size} ranks cannot divide {BATCH} windows evenly"
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)  # fully_shard() takes this rank's part of what is there: the ranks must start alike
files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)

mesh = init_device_mesh("cpu", (size,))
model = GPT()
for block in model.blocks:
    fully_shard(block, mesh=mesh)  # gathered when it is needed, and freed again, one block at a time
fully_shard(model, mesh=mesh)  # what is left: embeddings and head
optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

done = 0
if args.resume:  # each rank reads its part; the state dicts say which
    parts, optimizer_parts = get_state_dict(model, optimizer)
    saved: dict[str, Any] = {"model": parts, "optimizer": optimizer_parts, "steps": 0}
    dcp.load(saved, checkpoint_id=args.checkpoint)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    done = saved["steps"]
start = time.perf_counter()
for step in range(done + 1, args.steps + 1):
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    windows = text[starts + torch.arange(CONTEXT + 1)].long().chunk(size)[rank]
    optimizer.zero_grad()
    loss = model(windows)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)  # the norm over all ranks
    optimizer.step()
    mean = loss.detach().clone()
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    if rank == 0 and (step % 20 == 0 or step in (1, args.steps)):
        print(f"step {step}  loss {mean:.12f} nats/byte  {time.perf_counter() - start:.1f} s", flush=True)
parts, optimizer_parts = get_state_dict(model, optimizer)
dcp.save({"model": parts, "optimizer": optimizer_parts, "steps": args.steps}, checkpoint_id=args.checkpoint)
dist.destroy_process_group()
