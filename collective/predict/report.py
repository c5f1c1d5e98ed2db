"""What a run tells: tables, a file of all figures, and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..bench.sizes import format_bytes
from ..bench.units import format_rate, format_seconds
from .costs import Machine
from .measure import Steps
from .prediction import Prediction
from .profile import Profile
from .sweep import Times

__all__ = ["Row", "plot", "print_measured", "print_report", "write_json"]

_WIDTH = 160  # mpirun has ranks write to a terminal of its own, whose 80 columns mean nothing


@dataclass(frozen=True)
class Row:
    """A number of nodes: the prediction for the fusion threshold as it is, and for the best one."""

    usual: Prediction
    best: Prediction

    @property
    def ranks(self) -> int:
        return self.usual.setting.nodes * self.usual.setting.ranks


def print_report(profile: Profile, machine: Machine, origin: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Print what was known, and a row for each number of nodes."""
    setting = rows[0].usual.setting
    computation = profile.computation
    print(
        f"{profile.name}: {len(profile.gradients)} gradients of {profile.nbytes / 1e6:.4g} MB; forward "
        f"{format_seconds(computation.forward)}, backward {format_seconds(computation.backward)}, optimizer "
        f"{format_seconds(computation.optimizer)} ({profile.source})"
    )
    print(
        f"between nodes: latency {format_seconds(machine.latency)} ({origin['latency']}), bandwidth "
        f"{format_rate(machine.bandwidth)} each way per node ({origin['bandwidth']})\n"
        f"on a node: latency {format_seconds(machine.node_latency)} ({origin['node_latency']}), memory "
        f"{machine.memory_bandwidth / 1e9:.3g} GB/s ({origin['memory_bandwidth']})\n"
        f"per bucket: {format_seconds(machine.overhead)} ({origin['overhead']}); "
        f"{'16-bit numbers' if setting.compressed else 'gradients as they are'} on the wire; computation takes "
        f"{setting.slowdown:g} times as long while a bucket is in flight"
    )
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"predicted step, buckets of up to {format_bytes(rows[0].usual.threshold)}",
        title_justify="left",
        caption="communication: of all buckets one by one; exposed: how much longer the step is than without it;\n"
        "efficiency: the step without communication over the step\n"
        "best: the fusion threshold of the shortest step, or of one within 0.1 % of it with fewer buckets",
        caption_justify="left",
    )
    columns = ["nodes", "ranks", "step", "communication", "exposed", "efficiency", "best", "step", "efficiency"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        usual, best = row.usual, row.best
        table.add_row(
            str(usual.setting.nodes),
            str(row.ranks),
            format_seconds(usual.step),
            format_seconds(usual.communication),
            format_seconds(usual.exposed),
            f"{100 * usual.efficiency:.1f} %",
            format_bytes(best.threshold),
            format_seconds(best.step),
            f"{100 * best.efficiency:.1f} %",
        )
    _show(table)


def print_measured(prediction: Prediction, steps: Steps) -> None:
    """Print the prediction for this job beside what its steps took."""
    local, distributed = (statistics.median(samples.wall) for samples in (steps.local, steps.distributed))
    setting, total = prediction.setting, prediction.computation.total
    nodes = "1 node" if setting.nodes == 1 else f"{setting.nodes} nodes"
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"predicted and measured, {nodes} of {setting.ranks} ranks",
        title_justify="left",
        caption=f"measured: median of {len(steps.distributed.wall)} steps, which took turns; the slowest rank's",
        caption_justify="left",
    )
    for column in ("", "predicted", "measured", "minimum", "predicted/measured"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    predicted = [total, prediction.step, prediction.exposed]
    measured = [local, distributed, distributed - local]
    least = [f"{format_seconds(min(samples.wall))}" for samples in (steps.local, steps.distributed)]
    for name, a, b, minimum in zip(
        ("without communication", "step", "exposed"), predicted, measured, [*least, "-"], strict=True
    ):
        table.add_row(name, format_seconds(a), format_seconds(b), minimum, f"{a / b:.2f}" if b > 0 else "-")
    table.add_row("efficiency", f"{100 * prediction.efficiency:.1f} %", f"{100 * local / distributed:.1f} %", "-", "-")
    _show(table)


def _show(table: Table) -> None:
    """Print it without the blanks that pad its lines."""
    console = Console(width=_WIDTH, force_terminal=False, highlight=False)
    with console.capture() as printed:
        console.print(table)
    print("\n" + "\n".join(line.rstrip() for line in printed.get().splitlines()))


def write_json(
    path: Path,
    profile: Profile,
    machine: Machine,
    origin: Mapping[str, str],
    sweep: Mapping[str, Times],
    rows: Sequence[Row],
    measured: tuple[Prediction, Steps] | None,
) -> None:
    """Write {"profile", "machine", "origin", "sweep", "predictions": [...], "measured"}, in seconds and bytes."""
    content: dict[str, Any] = {
        "profile": {"name": profile.name, "source": profile.source, **asdict(profile.computation)},
        "machine": asdict(machine),
        "origin": dict(origin),
        "sweep": {
            where: [{"buckets": count, "nbytes": nbytes, "seconds": time} for (count, nbytes), time in times.items()]
            for where, times in sweep.items()
        },
        "predictions": [_figures(row.usual) | {"best": _figures(row.best)} for row in rows],
        "measured": None,
    }
    if measured is not None:
        prediction, steps = measured
        content["measured"] = {
            "predicted": _figures(prediction),
            "local": steps.local.wall,
            "distributed": steps.distributed.wall,
        }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _figures(prediction: Prediction) -> dict[str, Any]:
    replayed = prediction.replay
    return {
        "nodes": prediction.setting.nodes,
        "ranks_per_node": prediction.setting.ranks,
        "compressed": prediction.setting.compressed,
        "slowdown": prediction.setting.slowdown,
        "threshold": prediction.threshold,
        "step": prediction.step,
        "communication": prediction.communication,
        "exposed": prediction.exposed,
        "efficiency": prediction.efficiency,
        "buckets": [
            {"nbytes": nbytes, "ready": ready, "done": done}
            for nbytes, ready, done in zip(prediction.buckets, replayed.started, replayed.done, strict=True)
        ],
    }


def plot(path: Path, profile: Profile, rows: Sequence[Row]) -> None:
    """Draw efficiency over ranks; the file's ending says its format: .png, .svg or .pdf."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    ranks = [row.ranks for row in rows]
    threshold = format_bytes(rows[0].usual.threshold)
    axes.plot(ranks, [100 * row.usual.efficiency for row in rows], marker="o", label=f"buckets of up to {threshold}")
    axes.plot(ranks, [100 * row.best.efficiency for row in rows], marker="s", linestyle="--", label="the best size")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(count) for count in ranks])
    axes.minorticks_off()
    axes.set_ylim(0, 105)
    axes.set_xlabel(f"ranks, {rows[0].usual.setting.ranks} per node")
    axes.set_ylabel("predicted efficiency (%)")
    axes.set_title(f"{profile.name} ({profile.source})", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
