"""Settings from the environment: read once, at `init()`, in this one place.

| variable | default | unit | effect |
|---|---|---|---|
| COLLECTIVE_TIMEOUT | 300 | s | an operation that a rank has not joined by then raises CollectiveTimeoutError |
| COLLECTIVE_STALL_WARNING | 10 | s | after this wait a warning names the tensor and the ranks that are missing |
| COLLECTIVE_FUSION_THRESHOLD | 8388608 | bytes | smaller tensors share buckets of up to this size |

Rank 0's values hold for the whole job where ranks must agree (time-outs, fusion).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from environs import Env, EnvError
from marshmallow import validate

from .errors import InvalidArgumentError

__all__ = ["Config", "launched_size"]

_PREFIX = "COLLECTIVE_"


@dataclass(frozen=True)
class Config:
    """The settings of this process; see the table above."""

    timeout: float
    stall_warning: float
    # Large enough that per-message costs vanish, small enough that packing one bucket overlaps sending another and
    # that the first gradients do not wait for the last: docs/architecture.md has the measurement.
    fusion_threshold: int

    @classmethod
    def from_environment(cls) -> Config:
        """Read COLLECTIVE_*; a malformed or unknown variable raises InvalidArgumentError that names it."""
        env = Env()
        positive = validate.Range(min=0, min_inclusive=False)
        try:
            config = cls(
                timeout=env.float(_PREFIX + "TIMEOUT", 300.0, validate=positive),
                stall_warning=env.float(_PREFIX + "STALL_WARNING", 10.0, validate=positive),
                fusion_threshold=env.int(_PREFIX + "FUSION_THRESHOLD", 8 << 20, validate=validate.Range(min=0)),
            )
        except EnvError as error:
            raise InvalidArgumentError(str(error)) from None
        known = {_PREFIX + field.upper() for field in cls.__dataclass_fields__}
        unknown = sorted(name for name in os.environ if name.startswith(_PREFIX) and name not in known)
        if unknown:
            raise InvalidArgumentError(
                f"unknown setting {', '.join(unknown)}; the settings are {', '.join(sorted(known))}"
            )
        return config


def launched_size() -> tuple[str, int]:
    """How many ranks the launcher says it started, and the variable that says so; ("", 1) without a launcher."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        value = os.environ.get(name, "")
        if value.isdigit():
            return name, int(value)
    return "", 1
