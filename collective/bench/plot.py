"""The picture of a run: bandwidth over size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .results import Result
from .sizes import format_bytes

__all__ = ["plot_bandwidth"]


def plot_bandwidth(path: Path, title: str, results: Sequence[Result]) -> None:
    """Write algbw over bytes per rank, one line per contender, solid for warm and dashed for cold.

    The file's ending says its format: .png, .svg or .pdf. Raises ValueError if nothing was measured over sizes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [result for result in results if result.workload in ("latency", "bandwidth")]
    if not chosen:
        raise ValueError("a plot needs the workload latency or bandwidth")
    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    dtypes = list(dict.fromkeys(result.dtype for result in chosen))
    for index, contender in enumerate(dict.fromkeys(result.contender for result in chosen)):
        for marker, dtype in zip("osv^", dtypes, strict=False):
            for cold in (False, True):
                # Sizes beyond the cache have no such choice: they end both lines.
                line = [r for r in chosen if (r.contender, r.dtype) == (contender, dtype) and r.cold in (cold, None)]
                if not any(r.cold is cold for r in line) and not (line and not cold):
                    continue
                axes.plot(
                    [r.nbytes for r in line],
                    [r.nbytes / r.median / 1e9 for r in line],
                    color=f"C{index}",
                    linestyle="--" if cold else "-",
                    marker=marker,
                    markersize=3,
                    label=" ".join([contender, *([dtype] if len(dtypes) > 1 else []), *(["cold"] if cold else [])]),
                )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({result.nbytes for result in chosen})
    axes.set_xticks(ticks, [format_bytes(tick) for tick in ticks], rotation=45, ha="right")
    axes.minorticks_off()
    axes.set_xlabel("bytes per rank")
    axes.set_ylabel("GB/s (bytes per rank / median time)")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2, handlelength=4)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
