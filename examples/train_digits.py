# mpirun -np 2 --bind-to none python examples/train_digits.py --compression fp16
"""Trains a small CNN on scikit-learn's handwritten digits, on any number of ranks.

What data-parallel training adds to a script for one process is numbered 1 to 4.
"""

import argparse
import hashlib
import os
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import collective.torch as hvd

parser = argparse.ArgumentParser(description="train a small CNN on scikit-learn's handwritten digits")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=16, help="samples per rank and step")
parser.add_argument("--lr", type=float, default=0.03, help="peak learning rate, times size")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--compression", choices=["none", "fp16", "bf16"], default="none", help="on the wire")
args = parser.parse_args()

hvd.init()  # 1. Join the other ranks.
torch.manual_seed(args.seed + hvd.rank())  # different weights on purpose: 4 makes them one model
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # the ranks share the cores: torch would take all of them for each

digits = load_digits()  # 1797 images of 8 x 8 pixels from 0 to 16
images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
labels = torch.tensor(digits.target)
train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)

# 2. Train on this rank's share of the samples, which set_epoch() below draws anew.
dataset = TensorDataset(images[train], labels[train])
sampler = DistributedSampler(dataset, num_replicas=hvd.size(), rank=hvd.rank(), seed=args.seed)
loader = DataLoader(dataset, batch_size=args.batch_size, sampler=sampler)

model = nn.Sequential(
    nn.Conv2d(1, 32, kernel_size=3, padding=1), nn.ReLU(),
    nn.Conv2d(32, 64, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10),
)  # fmt: skip

# 3. Average the gradients over the ranks while backward() still computes others. A step sees the samples of
# all ranks, so the learning rate is scaled by size; OneCycleLR warms up to it.
lr = args.lr * hvd.size()
compression = getattr(hvd.Compression, args.compression)
optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=args.epochs * len(loader))

# 4. Start from rank 0's weights and optimizer state on every rank.
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)


@torch.no_grad()
def evaluate() -> tuple[float, float]:
    """Mean loss and accuracy over the test set, of which each rank takes every size-th sample."""
    share = test[hvd.rank() :: hvd.size()]
    output, expected = model(images[share]), labels[share]
    loss = cross_entropy(output, expected, reduction="sum")
    correct = (output.argmax(dim=1) == expected).sum()
    # Sums rather than averages: where size does not divide the test set, some ranks have a sample more.
    total = hvd.allreduce(torch.stack([loss, correct]), op=hvd.Sum, name="evaluation") / len(test)
    return total[0].item(), total[1].item()


seconds = 0.0
for epoch in range(args.epochs):
    sampler.set_epoch(epoch)
    start = time.perf_counter()
    for batch, expected in loader:
        optimizer.zero_grad()
        cross_entropy(model(batch), expected).backward()
        optimizer.step()
        schedule.step()
    seconds += time.perf_counter() - start
    loss, accuracy = evaluate()
    if hvd.rank() == 0:  # lines, for mpirun and Slurm give ranks no terminal to redraw
        print(f"epoch {epoch + 1} of {args.epochs}: test loss {loss:.4f}, accuracy {accuracy:.1%}", flush=True)

# The same start and the same averages: all replicas must hold the same bits now.
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
digests = hvd.allgather_object(digest)
assert len(set(digests)) == 1, f"the replicas differ: {digests}"

if hvd.rank() == 0:
    speed = args.epochs * len(sampler) * hvd.size() / seconds
    print(f"parameters bitwise equal on {hvd.size()} of {hvd.size()} ranks: sha256 {digest[:16]}")
    print(f"test accuracy {100 * accuracy:.1f} %  loss {loss:.4f}  {speed:.0f} samples/s  {seconds:.1f} s")
