"""The tables that a run prints."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .devices import COPY, KERNELS
from .gradients import BUCKETS
from .link import GIVEN, LINK
from .peers import OURS
from .results import Result, read_json
from .sizes import format_bytes
from .wire import BYTES, CEILING, FP16, WIRE
from .wire_step import COMMUNICATION, CPU, STEP, TIME

__all__ = ["print_comparison", "print_report"]

_WIDTH = 160  # mpirun has ranks write to a terminal of its own, whose 80 columns mean nothing

_RATIO_CAPTION = "/x: the speed of ours over that of x; above 1 ours is faster"


def print_report(header: dict[str, Any], notes: Sequence[str], results: Sequence[Result]) -> None:
    """Print the header, the notes, and the tables of the workloads that were run."""
    print(_headline(header))
    for note in notes:
        print(f"note: {note}")
    for workload in dict.fromkeys(result.workload for result in results):
        chosen = [result for result in results if result.workload == workload]
        print()
        if workload == "idle":
            print(f"idle: {chosen[0].median:.2f} % of a core over {chosen[0].case} with nothing in flight")
        elif workload == "latency":
            _show(_times_table("latency", chosen, with_ratios=True))
        elif workload == "bandwidth":
            _show(_times_table("bandwidth", chosen, with_ratios=False))
            _show(_bandwidth_table(chosen, header["ranks"]))
        elif workload == "resnet50":
            _show(_gradients_table(chosen))
        elif workload == KERNELS:
            _show(_kernels_table(chosen))
        elif workload == "devices":
            _show(_times_table("devices", chosen, with_ratios=True))
        elif workload == LINK:
            print(_link_line(chosen[0]))
        elif workload == WIRE:
            _show(_wire_table(chosen))
            _show(_share_table(chosen))
        elif workload == BYTES:
            _show(_bytes_table(chosen))
        elif workload == STEP:
            _show(_wire_step_table(chosen))
        elif workload == "step":
            _show(_step_table(chosen))
        else:
            _show(_overlap_table(chosen))


def print_comparison(path: Path, header: dict[str, Any], results: Sequence[Result]) -> None:
    """Print every result beside the same one from an earlier run's --json file."""
    old_header, old = read_json(path)
    for what in ("processor", "cores", "mpi", "ranks", "ranks_per_node"):
        if old_header.get(what) != header[what]:
            print(f"note: {what} differs: {old_header.get(what)} in {path}, {header[what]} now")
    table = _table(
        f"now against {path}", ["workload", "case", "contender", "then", "now", "now/then"], "now/then: of medians"
    )
    for result in results:
        then = old.get(result.key)
        if then is None:
            table.add_row(*result.key, "-", _value(result.median, result.unit), "-")
            continue
        ratio = f"{result.median / then:.2f}" if then > 0 else "-"
        table.add_row(*result.key, _value(then, result.unit), _value(result.median, result.unit), ratio)
    _show(table)
    gone = [" ".join(key) for key in old if key not in {result.key for result in results}]
    if gone:
        print(f"note: only in {path}: {', '.join(gone)}")


def _show(table: Table) -> None:
    """Print it without the blanks that pad its lines."""
    console = Console(width=_WIDTH, force_terminal=False, highlight=False)
    with console.capture() as printed:
        console.print(table)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))


def _table(title: str, columns: Sequence[str], caption: str = "") -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, caption=caption or None, title_justify="left")
    table.caption_justify = "left"
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _headline(header: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version)
    nodes = header["ranks"] / header["ranks_per_node"]
    others = "an unknown number of" if header["others_busy_cores"] is None else f"{header['others_busy_cores']:.2f}"
    settings = ", ".join(f"{name} {value}" for name, value in header["settings"].items())
    return (
        f"{header['ranks']} ranks on {nodes:g} node{'s' if nodes > 1 else ''} of {header['cores']} cores: "
        f"{header['processor']}, {format_bytes(header['last_level_cache'])} last-level cache, SIMD {header['simd']}\n"
        f"{header['mpi']}; {versions}\n"
        f"settings: {settings}\n"
        f"{header['date']}; other processes kept {others} cores busy"
    )


def _value(value: float, unit: str) -> str:
    """With three digits: 12.3 us, 4.56 ms, 7.89 s, 10.1 %; a multiple without a unit."""
    if unit == "%":
        return f"{value:.1f} %"
    if unit == "x":
        return f"{value:.3f}"
    scale, name = (1e6, "us") if abs(value) < 1e-3 else (1e3, "ms") if abs(value) < 1 else (1.0, "s")
    return f"{_digits(value * scale)} {name}"


def _digits(value: float) -> str:
    size = abs(value)
    return f"{value:.2f}" if size < 10 else f"{value:.1f}" if size < 100 else f"{value:.0f}"


def _grid(results: Sequence[Result]) -> tuple[list[str], dict[str, dict[str, Result]]]:
    """The contenders, in order, and the results by case and contender."""
    rows: dict[str, dict[str, Result]] = {}
    for result in results:
        rows.setdefault(result.case, {})[result.contender] = result
    return list(dict.fromkeys(result.contender for result in results)), rows


def _peers(contenders: Sequence[str]) -> list[str]:
    return [name for name in contenders if name.split()[0] != OURS]


def _ratios(peers: Sequence[str], row: dict[str, Result]) -> list[str]:
    return [f"{row[name].median / row[OURS].median:.2f}" if name in row else "-" for name in peers]


def _times_table(workload: str, results: Sequence[Result], with_ratios: bool) -> Table:
    contenders, rows = _grid(results)
    peers = _peers(contenders) if with_ratios else []
    table = _table(
        f"{workload}: us per blocking all-reduce, median (minimum)",
        ["bytes per rank", *contenders, *(f"/{name}" for name in peers)],
        _RATIO_CAPTION if with_ratios else "",
    )
    for case, row in rows.items():
        cells = [_times(row[name], 1e6) if name in row else "-" for name in contenders]
        table.add_row(case, *cells, *_ratios(peers, row))
    return table


def _times(result: Result, scale: float) -> str:
    return f"{_digits(result.median * scale)} ({_digits(result.best * scale)})"


def _bandwidth_table(results: Sequence[Result], ranks: int) -> Table:
    contenders, rows = _grid(results)
    peers = _peers(contenders)
    table = _table(
        "bandwidth: GB/s, bytes per rank over median time (algbw)",
        ["bytes per rank", *contenders, "ours busbw", *(f"/{name}" for name in peers)],
        f"busbw: algbw * 2(p-1)/p, here {2 * (ranks - 1) / ranks:.3g}: what each rank sends and receives; "
        f"memcpy: bytes copied\n{_RATIO_CAPTION}",
    )
    for case, row in rows.items():
        speeds = {name: result.nbytes / result.median / 1e9 for name, result in row.items()}
        cells = [_digits(speeds[name]) if name in row else "-" for name in contenders]
        table.add_row(case, *cells, _digits(speeds[OURS] * 2 * (ranks - 1) / ranks), *_ratios(peers, row))
    return table


def _gradients_table(results: Sequence[Result]) -> Table:
    _, rows = _grid(results)
    ((case, row),) = rows.items()
    ours = [name for name in (OURS, BUCKETS) if name in row]
    table = _table(
        f"resnet50: gradients, {case}",
        ["contender", "ms", "minimum", "GB/s", *(f"{name}/it" for name in ours)],
        "ours/it: the speed of ours over that of the contender; above 1 ours is faster",
    )
    for name, result in row.items():
        ratios = [f"{result.median / row[our].median:.2f}" for our in ours]
        speed = _digits(result.nbytes / result.median / 1e9)
        table.add_row(name, _digits(result.median * 1e3), _digits(result.best * 1e3), speed, *ratios)
    return table


def _kernels_table(results: Sequence[Result]) -> Table:
    speeds = {result.case: result.nbytes / result.median for result in results}
    copy = next(speed for case, speed in speeds.items() if case.startswith(COPY))
    table = _table(
        "kernels: on the device of rank 0, timed by its events",
        ["kernel", "us", "minimum", "GB/s", "of a copy's"],
        "GB/s: bytes read and written over median time",
    )
    for result in results:
        speed = speeds[result.case]
        cells = [_digits(result.median * 1e6), _digits(result.best * 1e6), _digits(speed / 1e9)]
        table.add_row(result.case, *cells, f"{100 * speed / copy:.0f} %")
    return table


def _link_line(result: Result) -> str:
    rate = result.nbytes / result.best
    how = "as given" if result.contender == GIVEN else f"the best of {len(result.samples)} measurements"
    return f"wire: {result.case}, each link {rate / 1e6:.4g} MB/s or {8 * rate / 1e9:.3g} Gbit/s each way, {how}"


def _wire_table(results: Sequence[Result]) -> Table:
    contenders, rows = _grid(results)
    table = _table("wire: time of a blocking all-reduce, median", ["bytes per rank", *contenders])
    for case, row in rows.items():
        cells = [_value(row[name].median, "s") if name in row else "-" for name in contenders]
        table.add_row(case, *cells)
    return table


def _share_table(results: Sequence[Result]) -> Table:
    contenders, rows = _grid(results)
    contenders.remove(CEILING)
    with_fp16 = FP16 in contenders
    table = _table(
        "wire: % of the ceiling's speed",
        ["bytes per rank", *contenders, *(["fp16/fp32"] if with_fp16 else [])],
        "ceiling: 2(n-1)/n of the bytes at the rate of a link, for n nodes; fp16 sends half\n"
        "fp16/fp32: the speed of ours fp16 over that of ours",
    )
    for case, row in rows.items():
        shares = {name: 100 * row[CEILING].median / result.median for name, result in row.items()}
        cells = [f"{shares[name]:.1f}" if name in row else "-" for name in contenders]
        table.add_row(case, *cells, *([f"{row[OURS].median / row[FP16].median:.2f}"] if with_fp16 else []))
    return table


def _bytes_table(results: Sequence[Result]) -> Table:
    table = _table(
        f"wire: bytes sent for {results[0].case}",
        ["contender", "least node", "median", "most"],
        "by a node, as a multiple of 2(n-1)/n of\nthe array's; counted by its interfaces:\n"
        "what bypasses the kernel (InfiniBand)\nis not",
    )
    for result in results:
        cells = [_value(value, result.unit) for value in (result.best, result.median, max(result.samples))]
        table.add_row(result.contender, *cells)
    return table


def _wire_step_table(results: Sequence[Result]) -> Table:
    contenders, rows = _grid(results)
    table = _table(
        "wire: a training step that computes about as long as it communicates",
        ["contender", "ms per step", "minimum", "added ms", "CPU ms", "CPU added ms"],
        "added: median over rounds of the difference to the local step of the round\nCPU: user and system, all threads",
    )
    for name in contenders:
        time, cpu = rows[TIME][name], rows[CPU][name]
        cells = [time.median, time.best, _added(time, rows[TIME]["local"]), cpu.median, _added(cpu, rows[CPU]["local"])]
        shown = [_digits(value * 1e3) for value in cells]
        if name in ("local", COMMUNICATION):
            shown[2] = shown[4] = "-"
        table.add_row(name, *shown)
    return table


def _added(result: Result, local: Result) -> float:
    return statistics.median(a - b for a, b in zip(result.samples, local.samples, strict=True))


def _step_table(results: Sequence[Result]) -> Table:
    table = _table(
        f"step: {results[0].case}",
        ["contender", "ms per step", "minimum", "added ms"],
        "added: median over rounds of the difference to the local step of the round",
    )
    local = results[0]
    for result in results:
        cells = [_digits(value * 1e3) for value in (result.median, result.best, _added(result, local))]
        table.add_row(result.contender, *cells[:2], "-" if result is local else cells[2])
    return table


def _overlap_table(results: Sequence[Result]) -> Table:
    contenders, rows = _grid(results)
    table = _table(
        "overlap: one training step, ms",
        ["backward is", *contenders],
        "hidden: 1 - (step - local) / communication, median over rounds; "
        "CPU added: of all threads, to the local step; see collective/bench/training.py",
    )
    for case, row in rows.items():
        table.add_row(
            case,
            *(
                f"{row[name].median:.0f} %" if row[name].unit == "%" else _digits(row[name].median * 1e3)
                for name in contenders
            ),
        )
    return table
