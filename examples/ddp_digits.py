# mpirun -np 2 python examples/ddp_digits.py
"""The training of train_digits.py in the words of torch.distributed: DistributedDataParallel over MPI.

Only the lines numbered 1 and 2 differ from a script for another backend: there is no torchrun, and no MASTER_ADDR.
"""

import argparse
import hashlib
import os
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import collective.torch  # noqa: F401  # 1. Make the backend known; torch 2.14 finds it without.

parser = argparse.ArgumentParser(description="train a small CNN on scikit-learn's handwritten digits")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=16, help="samples per rank and step")
parser.add_argument("--lr", type=float, default=0.03, help="peak learning rate, times the number of ranks")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

dist.init_process_group("collective")  # 2. MPI says which rank this is, and of how many.
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(args.seed + rank)  # different weights on purpose: DistributedDataParallel makes them rank 0's
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # the ranks share the cores: torch would take all of them for each

digits = load_digits()  # 1797 images of 8 x 8 pixels from 0 to 16
images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
labels = torch.tensor(digits.target)
train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)

dataset = TensorDataset(images[train], labels[train])
sampler: DistributedSampler = DistributedSampler(dataset, seed=args.seed)  # asks torch.distributed for rank and size
loader = DataLoader(dataset, batch_size=args.batch_size, sampler=sampler)

model = nn.Sequential(
    nn.Conv2d(1, 32, kernel_size=3, padding=1), nn.ReLU(),
    nn.Conv2d(32, 64, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10),
)  # fmt: skip
model = DistributedDataParallel(model)
lr = args.lr * size
optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=args.epochs * len(loader))


@torch.no_grad()
def evaluate() -> tuple[float, float]:
    """Mean loss and accuracy over the test set, of which each rank takes every size-th sample."""
    share = test[rank::size]
    output, expected = model.module(images[share]), labels[share]
    loss = cross_entropy(output, expected, reduction="sum")
    correct = (output.argmax(dim=1) == expected).sum()
    total = torch.stack([loss, correct])
    dist.all_reduce(total)  # a sum: where size does not divide the test set, some ranks have a sample more
    return total[0].item() / len(test), total[1].item() / len(test)


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
    if rank == 0:
        print(f"epoch {epoch + 1} of {args.epochs}: test loss {loss:.4f}, accuracy {accuracy:.1%}", flush=True)

# The same start and the same averages: all replicas must hold the same bits now.
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
digests: list[str] = [""] * size
dist.all_gather_object(digests, digest)
assert len(set(digests)) == 1, f"the replicas differ: {digests}"

if rank == 0:
    speed = args.epochs * len(sampler) * size / seconds
    print(f"parameters bitwise equal on {size} of {size} ranks: sha256 {digest[:16]}")
    print(f"test accuracy {100 * accuracy:.1f} %  loss {loss:.4f}  {speed:.0f} samples/s  {seconds:.1f} s")
dist.destroy_process_group()
