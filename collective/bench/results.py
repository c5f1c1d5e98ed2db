"""What a run found: one result for each thing measured, and the file that keeps them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Key", "Result", "read_json", "write_json"]

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Result:
    """The samples of one contender in one case of a workload; each is the largest of all ranks.

    Where something is counted on nodes, a sample belongs to a node.
    """

    workload: str
    """"bandwidth", say."""
    case: str
    """A row of the workload's table: "64 KiB warm", say."""
    contender: str
    """A column of it: "mpi", say."""
    samples: list[float]
    unit: Literal["s", "%", "x"] = "s"
    """Seconds, percent, or a multiple of something."""
    nbytes: int = 0
    """Bytes per rank that a call reduces; 0 where that makes no sense."""
    dtype: str = "float32"
    cold: bool | None = None
    """Whether buffers were out of the cache when a call began; None if the size leaves no choice."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)

    @property
    def key(self) -> Key:
        return (self.workload, self.case, self.contender)


def write_json(path: Path, header: dict[str, Any], notes: Sequence[str], results: Sequence[Result]) -> None:
    """Write {"header": ..., "notes": [...], "results": [a Result's fields, and "median" and "min"]}."""
    rows = [asdict(result) | {"median": result.median, "min": result.best} for result in results]
    path.write_text(json.dumps({"header": header, "notes": list(notes), "results": rows}, indent=1) + "\n")


def read_json(path: Path) -> tuple[dict[str, Any], dict[Key, float]]:
    """The header, and the medians by key, from a file that `write_json` wrote; raises ValueError for any other."""
    try:
        content = json.loads(path.read_text())
        medians = {(row["workload"], row["case"], row["contender"]): row["median"] for row in content["results"]}
        return content["header"], medians
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a file of --json: {error!r}") from error
