"""The command line."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import lifecycle, runtime
from ..bench.cli import parse_sizes
from ..bench.job import Job, has_torch
from ..bench.units import parse_count, parse_counts, parse_factor, parse_rate, parse_seconds

if TYPE_CHECKING:
    from .profile import Profile
    from .sweep import Measured
    from .training import Training

__all__ = ["main"]

_MACHINE = ("latency", "bandwidth", "node_latency", "memory_bandwidth", "overhead")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="[mpirun -np N] python -m collective.predict",
        description="Predicts how data-parallel training scales, from one profiled step and a short sweep.",
        epilog="Buckets are as large as COLLECTIVE_FUSION_THRESHOLD says. What is modelled: docs/predict.md.",
    )
    what = parser.add_argument_group("the training step; one of these").add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model",
        metavar="NAME",
        help="profile this one: resnet50, waiting (ResNet-50's gradients, and a backward that sleeps), mlp (2 MB), or "
        "module:callable, which returns (model, optimizer, loss), loss being called without arguments",
    )
    what.add_argument("--profile", type=Path, metavar="FILE", help="a profile that --save-profile has written")
    what.add_argument(
        "--published",
        choices=("inception_v3", "resnet101", "vgg16"),
        help="this network, with times from a published rate of a Pascal GPU",
    )
    machine = parser.add_argument_group("the machine; what is not given is measured under mpirun")
    add = machine.add_argument
    add("--latency", type=parse_seconds, metavar="TIME", help="of a short message between nodes, such as 10us")
    add("--bandwidth", type=parse_rate, metavar="RATE", help="of a node's link each way, such as 25Gbit or 3GB")
    add("--node-latency", type=parse_seconds, metavar="TIME", help="of a synchronisation on a node; else 2us")
    add(
        "--memory-bandwidth",
        type=parse_rate,
        metavar="RATE",
        help="what all ranks of a node load and store; else 40GB, or measured with --model",
    )
    add("--overhead", type=parse_seconds, metavar="TIME", help="what each bucket costs besides; else 0us")
    scale = parser.add_argument_group("what to predict")
    add = scale.add_argument
    add("--nodes", type=parse_counts, metavar="LIST", help="such as 1,2,4 or 1:1024, which doubles; else this job's")
    add("--ranks-per-node", type=parse_count, metavar="N", help="else as in this job")
    add("--compression", choices=("none", "fp16", "bf16"), default="none", help="of gradients on the wire")
    add(
        "--bucket-sizes",
        type=parse_sizes,
        default="1M:256M",
        metavar="LIST",
        help="fusion thresholds of which the best is shown; 1M:256M unless given",
    )
    add(
        "--slowdown",
        type=parse_factor,
        default=1.0,
        metavar="F",
        help="computation takes F times as long while a bucket is in flight, since the engine needs processors, too",
    )
    add("--steps", type=parse_count, default=10, metavar="N", help="how many to profile or measure; 10 unless given")
    add("--measure", action="store_true", help="train --model on this job's ranks and print what that took")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    output.add_argument("--plot", type=Path, metavar="FILE.png", help="draw efficiency over ranks")
    output.add_argument("--save-profile", type=Path, metavar="FILE", help="write the profile, for --profile")
    return parser


class _Silence(contextlib.ExitStack):
    """Within it this process prints nothing, unless it is rank 0: all ranks meet the same error."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        if rank != 0:
            self.enter_context(contextlib.redirect_stdout(io.StringIO()))
            self.enter_context(contextlib.redirect_stderr(io.StringIO()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict and report; collective, with the same arguments on every rank."""
    lifecycle.init()
    job = Job.start()
    parser = _parser()
    with _Silence(job.rank):
        options = parser.parse_args(arguments)
        if problem := _problem(options, job):
            parser.error(problem)
    try:
        _run(options, job)
    except ValueError as error:  # of a model, a profile: what the arguments name
        with _Silence(job.rank):
            parser.error(str(error))


def _problem(options: argparse.Namespace, job: Job) -> str:
    """What is wrong with options that are well formed by themselves; empty: nothing."""
    if not has_torch():
        return "torch is not installed"
    for module in ("rich", *(["matplotlib"] if options.plot else [])):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed; pip install 'collective[bench]' brings it"
    if not runtime.is_homogeneous():
        return "the nodes of this job have different numbers of ranks"
    if options.measure and (options.model is None or job.size == 1):
        return "--measure needs --model, and several ranks: mpirun -np 2 python -m collective.predict ..."
    is_known = {name for name in ("latency", "bandwidth") if getattr(options, name) is not None}
    if max(options.nodes or [1]) > 1 and job.size == job.local_size and len(is_known) < 2:
        return "--latency and --bandwidth are needed: this job is on one node, and cannot measure what lies between"
    return ""


def _run(options: argparse.Namespace, job: Job) -> None:
    # These need torch, which has been found by now.
    from .measure import measure_steps
    from .prediction import Setting, best, predict
    from .profile import write_profile
    from .report import Row, plot, print_measured, print_report, write_json
    from .sweep import merge
    from .training import find

    make = None if options.model is None else find(options.model)
    profile = _profile(options, job, make)
    given = {name: getattr(options, name) for name in _MACHINE if getattr(options, name) is not None}
    found = _measured(options, job, given)
    machine, origin = merge(given, found.fields)
    threshold = runtime.current().config.fusion_threshold
    ranks = options.ranks_per_node or job.local_size
    compressed = options.compression != "none"

    measured = None
    if options.measure and make is not None:
        _progress(job, "steps with communication and without, in turn")
        steps = measure_steps(job, make, options.steps, options.compression)
        here = Setting(job.size // job.local_size, job.local_size, machine, compressed, options.slowdown)
        measured = predict(profile, here, threshold), steps
    if job.rank != 0:
        return
    rows = []
    for nodes in options.nodes or [job.size // job.local_size]:
        setting = Setting(nodes, ranks, machine, compressed, options.slowdown)
        rows.append(Row(predict(profile, setting, threshold), best(profile, setting, options.bucket_sizes)))
    print_report(profile, machine, origin, rows)
    if measured:
        print_measured(*measured)
    if options.save_profile:
        write_profile(options.save_profile, profile)
    if options.json:
        write_json(options.json, profile, machine, origin, found.times, rows, measured)
    if options.plot:
        plot(options.plot, profile, rows)


def _profile(options: argparse.Namespace, job: Job, make: Callable[[], Training] | None) -> Profile:
    from .measure import profile_job
    from .profile import read_profile
    from .published import published_profile

    if make is not None:
        _progress(job, f"the profile of {options.model}")
        return profile_job(job, make, options.model, options.steps)
    if options.profile:
        return read_profile(options.profile)
    return published_profile(options.published)


def _measured(options: argparse.Namespace, job: Job, given: dict[str, float]) -> Measured:
    """What of the machine is measured, because this job can and it is not given."""
    from .sweep import Measured, copy_bandwidth, sweep

    wanted = {"memory_bandwidth"}
    if job.local_size > 1:
        wanted |= {"node_latency"}
    if job.size > job.local_size:
        wanted |= {"latency", "bandwidth"}
    if wanted <= given.keys():
        return Measured()
    if job.size > 1:
        _progress(job, "latencies and bandwidths")
        found = sweep(job)
        if "latency" in given:  # what a bucket costs besides has been fitted together with another latency
            found.fields.pop("overhead", None)
        return found
    return Measured({"memory_bandwidth": copy_bandwidth(job)} if options.model else {})


def _progress(job: Job, text: str) -> None:
    if job.rank == 0:
        print(f"collective.predict: {text}", file=sys.stderr, flush=True)
