# mpirun -np 2 --bind-to none python examples/train_gpt.py --steps 2000
"""Trains a small transformer, byte by byte, on the Python standard library's own sources; with accumulation, clipping,
bfloat16 on the wire, and checkpoints, also when SIGTERM or SIGUSR1 stops it: --resume goes on from the last one."""

import argparse
import os
import sysconfig
import time
from pathlib import Path
from signal import SIGUSR1

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import collective.torch as hvd

parser = argparse.ArgumentParser(description="train a small transformer on Python's own sources")
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--checkpoint", type=Path, default=Path("train_gpt.pt"))
parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
parser.add_argument("--device", default="cpu", help="where the model is")
args = parser.parse_args()
CONTEXT, WIDTH, HEADS, DEPTH = 128, 64, 4, 2  # bytes, channels, heads, blocks: 140,000 parameters
BATCH, PASSES, RATE, WARM_UP = 4, 2, 6e-3, 100  # windows in a pass, passes in a step, learning rate, steps


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


def draw(text: Tensor, seed: int) -> Tensor:
    """Random windows, by the seed alone: a resumed run draws what it would have drawn without the stop."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(CONTEXT + 1)].long().to(args.device)


guard = hvd.Preemption()  # from here on, these signals end no rank
hvd.init()
if args.device == "cuda":  # one for each rank; with fewer, ranks share
    args.device = f"cuda:{hvd.local_rank() % torch.cuda.device_count()}"
torch.manual_seed(hvd.rank())  # different weights on purpose: broadcast_parameters makes them one model
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # not all of the cores for each rank
files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
train, validation = text[: -len(text) // 10], text[-len(text) // 10 :]
model = GPT().to(args.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), hvd.Compression.bf16, PASSES)
saved = {"steps": 0}
if args.resume and hvd.rank() == 0:  # only rank 0 needs the file: the others have their state from rank 0
    saved = torch.load(args.checkpoint)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
start = time.perf_counter()
for step in range(hvd.broadcast_object(saved["steps"], root_rank=0) + 1, args.steps + 1):
    optimizer.param_groups[0]["lr"] = RATE * min(1.0, step / WARM_UP)
    optimizer.zero_grad()
    for n in range(step * PASSES, (step + 1) * PASSES):
        loss = model(draw(train, n * hvd.size() + hvd.rank()))
        (loss / PASSES).backward()  # the last pass of a step starts the allreduce
    optimizer.synchronize()  # clipping needs the gradients of all ranks
    nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()  # does not reduce them again
    if (stop := guard.requested()) or step % 50 == 0 or step in (1, args.steps):
        with torch.no_grad():
            unseen = hvd.allreduce(sum(model(draw(validation, 8 * hvd.rank() + n)) for n in range(8)) / 8)
        if hvd.rank() == 0:
            print(f"step {step}  validation loss {unseen:.4f} nats/byte  {time.perf_counter() - start:.1f} s")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": step}
            torch.save(state, args.checkpoint.with_suffix(".new"))
            args.checkpoint.with_suffix(".new").replace(args.checkpoint)  # atomic
    if stop:
        break
if guard.agreed_signal == SIGUSR1 and step < args.steps:  # the time limit is near; by SIGTERM the job was cancelled
    guard.requeue()
