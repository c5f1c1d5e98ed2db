"""What is known of a training step without communication: how long its parts take, and when each gradient comes."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .replay import Computation
from .training import Training

__all__ = ["Gradient", "Profile", "read_profile", "take_profile", "write_profile"]

_FORMAT = "collective.predict profile 1"


@dataclass(frozen=True)
class Gradient:
    """The gradient of one parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Of the parameter: "float32", say."""
    ready: float
    """Seconds from the start of backward until it has been accumulated."""

    @property
    def nbytes(self) -> int:
        """In its own type."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class Profile:
    """A training step of one rank, without communication; all times in seconds."""

    name: str
    source: str
    """Where the times come from, for people."""
    computation: Computation
    gradients: Sequence[Gradient]
    """In the order in which the first backward produced them, in which the reducer deals them to buckets."""

    @property
    def nbytes(self) -> int:
        """Of all gradients in their own types."""
        return sum(gradient.nbytes for gradient in self.gradients)


def take_profile(
    training: Training,
    name: str,
    steps: int,
    *,
    together: Callable[[], object] = lambda: None,
    on_all_ranks: Callable[[list[int], list[float]], tuple[list[int], list[float]]] = lambda order, times: (
        order,
        times,
    ),
) -> Profile:
    """Profile a training step on the CPU: the medians of several, after one that is not counted.

    Args:
        training: what is trained; its parameters change.
        name: of the model.
        steps: how many are counted.
        together: called before each step; a barrier, where several ranks share a machine.
        on_all_ranks: makes of this rank's order of arrival (one number for each parameter) and its times what holds
            for all ranks.

    Raises:
        ValueError: a parameter is not on the CPU, where a hook cannot see when its gradient is computed; there is none;
            or no gradient came.
    """
    names = {p: name for name, p in training.model.named_parameters()}
    parameters = [p for group in training.optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not parameters:
        raise ValueError(f"{name} has no parameter that is trained")
    if elsewhere := [str(p.device) for p in parameters if p.device.type != "cpu"]:
        raise ValueError(
            f"{name} has parameters on {elsewhere[0]}; profiles are taken on the CPU only. Time the step with the "
            "device's own tools and give the result by --profile"
        )
    parameters.reverse()  # as the reducer numbers them
    arrivals: dict[torch.Tensor, float] = {}

    def arrived(parameter: torch.Tensor) -> None:
        arrivals[parameter] = time.perf_counter()

    hooks = [p.register_post_accumulate_grad_hook(arrived) for p in parameters]
    order: list[int] = []
    samples: list[list[float]] = []
    try:
        for step in range(steps + 1):
            arrivals.clear()
            training.optimizer.zero_grad()
            together()
            begin = time.perf_counter()
            loss = training.loss()
            forward_end = time.perf_counter()
            loss.backward()  # type: ignore[no-untyped-call]
            backward_end = time.perf_counter()
            training.optimizer.step()
            end = time.perf_counter()
            if not arrivals:
                raise ValueError(f"{name}: backward produced no gradient of a parameter of the optimizer")
            if step == 0:
                place = {p: number for number, p in enumerate(arrivals)}
                order = [place.get(p, len(parameters)) for p in parameters]
                continue
            parts = [forward_end - begin, backward_end - forward_end, end - backward_end]
            samples.append(parts + [arrivals.get(p, backward_end) - forward_end for p in parameters])
    finally:
        for hook in hooks:
            hook.remove()
    order, times = on_all_ranks(order, [statistics.median(values) for values in zip(*samples, strict=True)])
    gradients = [
        Gradient(names.get(p, f"parameter.{n}"), tuple(p.shape), str(p.dtype).removeprefix("torch."), ready)
        for n, (p, ready) in enumerate(zip(parameters, times[3:], strict=True))
    ]
    sorted_gradients = [gradients[n] for n in sorted(range(len(order)), key=order.__getitem__)]
    return Profile(name, f"median of {steps} steps", Computation(*times[:3]), sorted_gradients)


def write_profile(path: Path, profile: Profile) -> None:
    """Write a file that `read_profile` reads: docs/predict.md describes it."""
    path.write_text(json.dumps({"format": _FORMAT, **asdict(profile)}, indent=1) + "\n")


def read_profile(path: Path) -> Profile:
    """The profile in a file; raises ValueError, which says what is wrong, if there is none."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {_FORMAT!r}")
        gradients = [
            Gradient(str(row["name"]), tuple(map(int, row["shape"])), str(row["dtype"]), _seconds(row["ready"]))
            for row in content["gradients"]
        ]
        if unknown := [g.dtype for g in gradients if not isinstance(getattr(torch, g.dtype, None), torch.dtype)]:
            raise ValueError(f"there is no dtype {unknown[0]!r}")
        if not gradients:
            raise ValueError("it has no gradients")
        parts = content["computation"]
        computation = Computation(*(_seconds(parts[part]) for part in ("forward", "backward", "optimizer")))
        return Profile(str(content["name"]), str(content["source"]), computation, gradients)
    except KeyError as error:
        raise ValueError(f"{path} is not a profile: it has no {error}") from error
    except (TypeError, ValueError) as error:  # of which a JSONDecodeError is one
        raise ValueError(f"{path} is not a profile: {error}") from error


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is not a time in seconds")
    return float(value)
