"""Checks of what was measured between ranks: addresses, links, clocks, all-reduces."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .findings import Finding, fail, ok, rate_text, size_text, time_text, warn
from .job import Job, Pair

__all__ = ["all_reduces", "between_nodes", "clocks", "slow_pairs", "way", "within_nodes"]

_SLOW = 2.0  # times the median
_LATE_S = 20e-6  # above the median: less is within what a switch more takes
_SCHEDULED_S = 100e-6  # shared memory takes a hundredth of it
_CLOCK_S = 0.010
_NAMED = 3  # of the slow pairs, the worst


def way(job: Job) -> list[Finding]:
    """By which address hosts reach rank 0, as gloo and torch.distributed's store have to."""
    ways = job.measured.ways
    if ways is None or len(job.nodes) == 1:
        return []
    if None in ways:
        remedy = "Open the ports between hosts, or name the right interface in GLOO_SOCKET_IFNAME."
        return [warn("no address of rank 0's host can be reached by TCP from all hosts", remedy)]
    reached = [found for found in ways if found is not None]
    through = ", ".join(
        f"{job.ranks[first]['host']} {interface}" for first, (_, interface) in zip(job.nodes, reached, strict=True)
    )
    return [ok(f"all hosts reach rank 0 at {reached[0][0]}, through {through}")]


def slow_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Those of at least three that are much slower than the median; the slowest first."""
    if len(pairs) < 3:
        return []
    bandwidth = statistics.median(pair.bandwidth for pair in pairs)
    latency = statistics.median(pair.latency for pair in pairs)
    slow = [
        pair
        for pair in pairs
        if pair.bandwidth * _SLOW < bandwidth or pair.latency > max(_SLOW * latency, latency + _LATE_S)
    ]
    return sorted(slow, key=lambda pair: pair.bandwidth)


def between_nodes(job: Job) -> list[Finding]:
    """Latency and bandwidth of pairs of nodes."""
    pairs = job.measured.node_pairs
    if not pairs:
        return []
    left = job.measured.node_pairs_left
    some = f"; the time was up before {left} other pairs" if left else ""
    findings = [ok(f"between {len(job.nodes)} nodes: {_figures(pairs)}{some}")]
    slow = slow_pairs(pairs)
    for pair in slow[:_NAMED]:
        text = f"{_between(job, pair)}: {_figures([pair])}, against a median of {_rate(pairs)} and {_delay(pairs)}"
        findings.append(warn(text, "Look at the cable, the port and the switch of these hosts, or leave one out."))
    if len(slow) > _NAMED:
        remedy = "Look for the host that they have in common."
        findings.append(warn(f"{len(slow) - _NAMED} more pairs of hosts are as slow", remedy))
    return findings


def within_nodes(job: Job) -> list[Finding]:
    """Latency and bandwidth of MPI's messages on a node."""
    pairs = job.measured.local_pairs
    if not pairs:
        return []
    findings = [ok(f"a message of MPI's on a node: {_figures(pairs)}")]
    first = job.ranks[pairs[0].ranks[0]]
    typical = statistics.median(pair.typical for pair in pairs)
    if typical > _SCHEDULED_S:
        load = f"{first['host']} had a load of {first['load']:.1f} before"
        text = f"{findings[0].text}, at best; half take more than {time_text(typical)}: ranks wait for a core; {load}"
        remedy = "Let nothing else run on these cores, and start no more ranks than there are."
        findings = [warn(text, remedy)]
    for pair in slow_pairs(pairs)[:_NAMED]:
        host = job.ranks[pair.ranks[0]]["host"]
        text = f"on {host}: {_figures([pair])}, against a median of {_rate(pairs)} and {_delay(pairs)}"
        findings.append(warn(text, f"Look for other processes on {host}, and at the binding of its ranks."))
    return findings


def _between(job: Job, pair: Pair) -> str:
    return " and ".join(job.name_of(rank) for rank in pair.ranks)


def _figures(pairs: Sequence[Pair]) -> str:
    median = "" if len(pairs) == 1 else f", the medians of {len(pairs)} pairs"
    return f"{_delay(pairs)}, {_rate(pairs)}{median}"


def _rate(pairs: Sequence[Pair]) -> str:
    return rate_text(statistics.median(pair.bandwidth for pair in pairs))


def _delay(pairs: Sequence[Pair]) -> str:
    return time_text(statistics.median(pair.latency for pair in pairs))


def clocks(job: Job) -> list[Finding]:
    """Those of hosts, which timelines and logs of several hosts are laid side by side by."""
    offsets = job.measured.clocks
    if offsets is None or len(job.nodes) == 1:
        return []
    hosts = [job.ranks[first]["host"] for first in job.nodes]
    off = [(host, offset) for host, offset in zip(hosts, offsets, strict=True) if abs(offset) > _CLOCK_S]
    if off:
        text = ", ".join(f"{host} by {time_text(offset)}" for host, offset in off)
        return [warn(f"clocks differ from {hosts[0]}'s: {text}", "Let chrony or ntpd run on all hosts.")]
    return [ok(f"clocks differ by {time_text(max(map(abs, offsets)))} at most")]


def all_reduces(job: Job) -> list[Finding]:
    """Results, which must be right, and times."""
    if job.measured.all_reduces is None:
        return []
    findings = []
    for result in job.measured.all_reduces:
        what = f"an all-reduce of {size_text(result.nbytes)}"
        if result.wrong:
            names = ", ".join(job.name_of(rank) for rank in result.wrong)
            remedy = "Report this; COLLECTIVE_SHARED_MEMORY=0 or another transport of the MPI tell which part is wrong."
            findings.append(fail(f"{what} gives a wrong sum on {names}", remedy))
        else:
            findings.append(ok(f"{what} takes {time_text(result.seconds)}, and is right"))
    if job.measured.left_out:
        findings.append(ok(f"none of 64 MiB was tried: {job.measured.left_out}"))
    return findings
