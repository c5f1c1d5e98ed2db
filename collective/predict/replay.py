"""Replays a training step: computation runs, buckets become ready, and share the link and the memory of their node.

Time goes from event to event: a bucket becomes ready, or ends a phase, or backward ends. In between everything moves at
a constant speed. A phase that takes a latency and keeps its resource busy for some time could, alone, use

    busy / (latency + busy)

of the resource on average. If all that are on it want more than there is, they share it evenly, as the engine steps
them in turn, and one that wants less than its share leaves the rest to the others. So latencies of several buckets
pass at the same time, and a link is never used beyond its rate.

All nodes do the same at the same time; so one of them is replayed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .costs import Machine, Phase

__all__ = ["Computation", "Replay", "Work", "replay"]

_TOGETHER = 1e-9  # events that are nearer to each other, as a fraction of the time to the first, happen at once


@dataclass(frozen=True)
class Computation:
    """Seconds of a step without communication, on the slowest rank."""

    forward: float
    backward: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.optimizer


@dataclass(frozen=True)
class Work:
    """A bucket: seconds of backward after which it is ready, and what it then goes through."""

    ready: float
    phases: Sequence[Phase]


@dataclass(frozen=True)
class Replay:
    """Seconds since the step began."""

    computed: float
    """The end of backward, which may be slower than without communication."""
    started: Sequence[float]
    """When each bucket became ready."""
    done: Sequence[float]
    """When each bucket was reduced."""
    step: float
    """The end of the step: all buckets are reduced, fetched, and the optimizer has run."""


@dataclass(eq=False)
class _Flight:
    number: int  # of the bucket
    rest: Iterator[Phase]
    phase: Phase
    latency: float
    busy: float
    left: float = 1.0  # of the phase


def replay(
    computation: Computation, buckets: Sequence[Work], machine: Machine, slowdown: float = 1.0, fetch: float = 0.0
) -> Replay:
    """Replay one step.

    Args:
        computation: the step without communication.
        buckets: what is reduced; one that is not ready before backward ends starts then.
        machine: latencies and bandwidths.
        slowdown: how many times as long computation takes while a bucket is in flight, 1 or more.
        fetch: seconds from the last bucket's end to when the optimizer can run.
    """
    end = computation.forward + computation.backward
    ready = [computation.forward + min(work.ready, computation.backward) for work in buckets]
    waiting = sorted(range(len(buckets)), key=ready.__getitem__, reverse=True)  # the next one last
    started, done = [0.0] * len(buckets), [0.0] * len(buckets)
    flights: list[_Flight] = []
    now = computed = 0.0
    progress = 0.0  # of forward and backward, in seconds of computation
    while True:
        while waiting and ready[waiting[-1]] <= progress:
            number = waiting.pop()
            started[number] = done[number] = now
            flights += _next(number, iter(buckets[number].phases), machine)
        is_computing = progress < end
        if not is_computing and not flights:
            break
        speed = 1 / slowdown if flights else 1.0
        target = min(end, ready[waiting[-1]]) if waiting else end
        to_target = (target - progress) / speed if is_computing else math.inf
        rates = _rates(flights)
        times = [flight.left / rate for flight, rate in zip(flights, rates, strict=True)]
        passed = min([to_target, *times])
        at_once = passed * (1 + _TOGETHER)
        now += passed
        if is_computing:
            progress = target if to_target <= at_once else progress + passed * speed
            computed = now
        still: list[_Flight] = []
        for flight, rate, time in zip(flights, rates, times, strict=True):
            if time <= at_once:
                done[flight.number] = now
                still += _next(flight.number, flight.rest, machine)
            else:
                flight.left -= passed * rate
                still.append(flight)
        flights = still
    return Replay(computed, started, done, now + fetch + computation.optimizer)


def _next(number: int, rest: Iterator[Phase], machine: Machine) -> list[_Flight]:
    """The bucket in its next phase that takes any time; nothing if there is none."""
    for phase in rest:
        latency, busy = phase.latency(machine), phase.busy(machine)
        if latency + busy > 0:
            return [_Flight(number, rest, phase, latency, busy)]
    return []


def _rates(flights: Sequence[_Flight]) -> list[float]:
    """How much of its phase each of them does per second."""
    rates: dict[_Flight, float] = {}
    for on_link in (False, True):
        chosen = [(f.busy / (f.latency + f.busy), f) for f in flights if f.phase.on_link is on_link]
        chosen.sort(key=lambda pair: pair[0])
        free = 1.0
        for number, (wanted, flight) in enumerate(chosen):
            share = free / (len(chosen) - number)
            rates[flight] = 1 / (flight.latency + flight.busy) if wanted <= share else share / flight.busy
            free -= min(wanted, share)
    return [rates[flight] for flight in flights]
