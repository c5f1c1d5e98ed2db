"""A prediction: the reducer's plan for a profile, the costs of its buckets, and the replay of a step with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..torch.buckets import Slot, deal, dense_strides
from .costs import Machine, bucket
from .profile import Gradient, Profile
from .replay import Computation, Replay, Work, replay

__all__ = ["Prediction", "Setting", "best", "plan", "predict", "wire_bytes"]


@dataclass(frozen=True)
class Setting:
    """What is predicted for, besides the profile.

    Args:
        nodes: how many.
        ranks: on each node.
        machine: latencies and bandwidths.
        compressed: whether float32 and float64 travel as 16-bit numbers.
        slowdown: how many times as long computation takes while a bucket is in flight.
    """

    nodes: int
    ranks: int
    machine: Machine
    compressed: bool = False
    slowdown: float = 1.0


@dataclass(frozen=True)
class Prediction:
    """A step of all ranks together; seconds and bytes."""

    setting: Setting
    threshold: int
    """The fusion threshold: most bytes of a bucket."""
    computation: Computation
    buckets: Sequence[int]
    """Bytes of each in the wire's type, in the order in which they are dealt."""
    replay: Replay
    communication: float
    """The sum of what the buckets would take one by one, with nothing to hide them."""

    @property
    def step(self) -> float:
        return self.replay.step

    @property
    def exposed(self) -> float:
        """How much longer a step takes than without communication."""
        return self.step - self.computation.total

    @property
    def efficiency(self) -> float:
        """The step without communication over the step: 1 if every rank is as fast as a single one."""
        return self.computation.total / self.step


def plan(gradients: Sequence[Gradient], threshold: int) -> list[list[Gradient]]:
    """The members of each bucket, as the reducer deals them (collective/torch/buckets.py).

    Args:
        gradients: in the order in which the first backward produced them.
        threshold: most bytes of a bucket.
    """
    of_slot: dict[Slot, Gradient] = {}
    for number, gradient in enumerate(gradients):
        # On torch's meta device, which takes no memory; the slots of a real reducer differ in nothing that deal() sees.
        # It cannot be integer gradients, but those need no gradient to be dealt.
        empty = torch.empty(gradient.shape, dtype=gradient.torch_dtype, device="meta")
        p = torch.nn.Parameter(empty, requires_grad=empty.is_floating_point() or empty.is_complex())
        of_slot[Slot(number, gradient.name, p, p.dtype, p.shape, dense_strides(p), p.device)] = gradient
    return [[of_slot[slot] for slot in members] for members in deal(list(of_slot), None, threshold)]


def wire_bytes(gradient: Gradient, compressed: bool) -> int:
    """What a gradient takes in the wire's type."""
    is_cast = compressed and gradient.torch_dtype in (torch.float32, torch.float64)
    return 2 * gradient.nbytes // gradient.torch_dtype.itemsize if is_cast else gradient.nbytes


def predict(profile: Profile, setting: Setting, threshold: int) -> Prediction:
    """Predict one step.

    Args:
        profile: of a rank's step without communication.
        setting: where it runs.
        threshold: most bytes of a bucket, in the gradients' own type.
    """
    machine = setting.machine
    work: list[Work] = []
    sizes: list[int] = []
    copied = 0.0  # bytes loaded and stored by each rank to fetch results
    for members in plan(profile.gradients, threshold):
        nbytes = sum(wire_bytes(gradient, setting.compressed) for gradient in members)
        own = sum(gradient.nbytes for gradient in members)
        phases = bucket(setting.nodes, setting.ranks, nbytes, packed=own + nbytes)
        if phases and nbytes < own:  # cast back; else gradients become views of their bucket
            copied += nbytes + own
        work.append(Work(max(gradient.ready for gradient in members), phases))
        sizes.append(nbytes)
    if work:  # it carries what the ranks tell each other when backward has ended
        work[-1] = replace(work[-1], ready=profile.computation.backward)
    fetch = setting.ranks * copied / machine.memory_bandwidth
    replayed = replay(profile.computation, work, machine, setting.slowdown, fetch)
    communication = sum(phase.alone(machine) for bucket_work in work for phase in bucket_work.phases)
    return Prediction(setting, threshold, profile.computation, sizes, replayed, communication)


def best(profile: Profile, setting: Setting, thresholds: Sequence[int]) -> Prediction:
    """The prediction with the shortest step of those for these thresholds.

    Of those that are within a thousandth of it, that with the fewest buckets, each of which costs time that is not
    modelled.
    """
    found = [predict(profile, setting, threshold) for threshold in thresholds]
    shortest = min(prediction.step for prediction in found)
    return min((p for p in found if p.step <= 1.001 * shortest), key=lambda p: (len(p.buckets), p.step))
