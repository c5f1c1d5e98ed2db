"""The command line."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .. import lifecycle, runtime
from . import c10d, machine
from .buffers import DTYPES
from .devices import devices
from .gradients import gradients
from .idle import idle
from .job import Job
from .peers import PEERS, contenders
from .results import Result, write_json
from .sizes import bandwidth, latency
from .training import overlap, step
from .units import parse_count, parse_rate
from .wire import wire

__all__ = ["main", "parse_bytes", "parse_sizes"]

WORKLOADS = ("idle", "latency", "bandwidth", "resnet50", "step", "overlap", "devices", "wire")
"""In the order in which they run: idle comes before gloo's threads exist."""

_DEVICE_SIZES = "64K,1M,16M,64M,256M"
_WIRE_SIZES = "1K,64K,1M,16M,64M"

_SIZES = "8,64,1K,4K,16K,64K,256K,1M,4M,16M,64M,256M"
_ALL_SIZES = "8:256M"


def parse_bytes(text: str) -> int:
    """8, 4K, 256M or 1G: a number of bytes, a multiple of 2**10, 2**20 or 2**30."""
    match = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 8, 4K or 256M")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()]


def parse_sizes(text: str) -> list[int]:
    """Sizes and ranges between commas; a range FIRST:LAST[:FACTOR] grows by the factor, 2 unless given."""
    sizes = []
    for part in text.split(","):
        ends = part.split(":")
        first, last = parse_bytes(ends[0]), parse_bytes(ends[min(1, len(ends) - 1)])
        factor = parse_bytes(ends[2]) if len(ends) > 2 else 2
        if len(ends) > 3 or factor < 2 or last < first:
            raise argparse.ArgumentTypeError(f"{part!r} is not a range FIRST:LAST[:FACTOR]")
        while first <= last:
            sizes.append(first)
            first *= factor
    return sorted(set(sizes))


def _names(known: Sequence[str], text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(known)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpirun -np N python -m collective.bench",
        description="Measures this package beside MPI_Allreduce, gloo and memcpy, all in one run.",
    )
    add = parser.add_argument
    add(
        "--workloads",
        type=partial(_names, WORKLOADS),
        default=list(WORKLOADS[:-2]),
        metavar="A,B",
        help=f"of {', '.join(WORKLOADS)}; all but the last two unless given",
    )
    add(
        "--peers",
        type=partial(_names, PEERS),
        default=list(PEERS),
        metavar="A,B",
        help=f"of {', '.join(PEERS)}; all unless given",
    )
    add(
        "--sizes",
        type=parse_sizes,
        metavar="LIST",
        help=f"bytes per rank, such as {_SIZES} (the default; of devices {_DEVICE_SIZES}, of wire {_WIRE_SIZES}) or "
        f"{_ALL_SIZES}, which is all powers of two between",
    )
    add(
        "--dtype",
        type=partial(_names, list(DTYPES)),
        metavar="A,B",
        help=f"of {', '.join(DTYPES)}; for latency and bandwidth; float32 unless given",
    )
    add("--full", action="store_true", help=f"--sizes {_ALL_SIZES} --dtype float32,float16,bfloat16")
    add("--repeat", type=parse_count, metavar="N", help="samples of each figure; 15 unless given, of wire 3 to 15")
    add("--idle-seconds", type=float, default=10.0, metavar="S", help="how long idle watches; 10 unless given")
    add(
        "--link-rate",
        type=parse_rate,
        metavar="RATE",
        help="of a node's link, such as 10gbit, with which wire compares; measured unless given",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    add("--plot", type=Path, metavar="FILE.png", help="draw bandwidth over size")
    add("--compare", type=Path, metavar="OLD.json", help="print each figure beside that of an earlier --json")
    return parser


def _parse(rank: int, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; on an error, or --help, every rank exits and rank 0 alone prints."""
    with contextlib.ExitStack() as stack:
        if rank != 0:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        parser = _parser()
        options = parser.parse_args(arguments)
        if importlib.util.find_spec("rich") is None:
            parser.error("rich is not installed; pip install 'collective[bench]' brings it")
        if options.plot and importlib.util.find_spec("matplotlib") is None:
            parser.error("--plot needs matplotlib; pip install 'collective[bench]' brings it")
        if options.plot and not {"latency", "bandwidth"} & set(options.workloads):
            parser.error("--plot needs the workload latency or bandwidth")
        if options.compare and not options.compare.is_file():
            parser.error(f"--compare: there is no file {options.compare}")
    options.device_sizes = options.sizes or parse_sizes(_DEVICE_SIZES)
    options.wire_sizes = options.sizes or parse_sizes(_WIRE_SIZES)
    options.sizes = options.sizes or parse_sizes(_ALL_SIZES if options.full else _SIZES)
    options.dtype = options.dtype or (["float32", "float16", "bfloat16"] if options.full else ["float32"])
    options.wire_repeat, options.repeat = options.repeat, options.repeat or 15
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report; collective, with the same arguments on every rank."""
    lifecycle.init()
    options = _parse(runtime.rank(), arguments)
    job = Job.start()
    header = machine.describe(job)
    others = machine.Others(job)
    results = _measure(job, options)
    header["others_busy_cores"] = others.busy_cores()
    c10d.disconnect()
    if job.rank != 0:
        return
    from .report import print_comparison, print_report

    print_report(header, job.notes, results)
    if options.json:
        write_json(options.json, header, job.notes, results)
    if options.plot:
        from .plot import plot_bandwidth

        plot_bandwidth(options.plot, f"{header['ranks']} ranks, {header['processor']}, {header['mpi']}", results)
    if options.compare:
        print_comparison(options.compare, header, results)


def _measure(job: Job, options: argparse.Namespace) -> list[Result]:
    results: list[Result] = []
    if "idle" in options.workloads:
        results += idle(job, options.idle_seconds)
    if {"latency", "bandwidth", "resnet50"} & set(options.workloads):
        peers = contenders(job, options.peers)
        if "latency" in options.workloads:
            results += latency(job, peers, options.sizes, options.dtype, options.repeat)
        if "bandwidth" in options.workloads:
            results += bandwidth(job, peers, options.sizes, options.dtype, options.repeat)
        if "resnet50" in options.workloads:
            results += gradients(job, peers, options.repeat)
    if "step" in options.workloads:
        results += step(job, options.repeat, "gloo" in options.peers)
    if "overlap" in options.workloads:
        results += overlap(job, options.repeat)
    if "devices" in options.workloads:
        results += devices(job, options.device_sizes, options.repeat, options.peers)
    if "wire" in options.workloads:
        results += wire(job, options.wire_sizes, options.wire_repeat, options.peers, options.link_rate)
    return results
