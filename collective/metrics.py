"""What all ranks have done, for Prometheus.

Rank 0 serves the whole job at one port, rather than each rank at its own: it is one target to name, no port depends on
where ranks are placed, and ranks that are silent are told by the rest, as in `collective top`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["Server"]

_OF_RANK = ("rank", "host")


class _OfJob(Collector):
    """Asks when it is scraped."""

    def __init__(self, report: Callable[[], dict[str, Any]]) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        """A family for each number; ranks that are silent have collective_rank_up 0 and nothing else."""
        ranks = self._report()["ranks"]
        answering = [rank for rank in ranks if rank["statistics"] is not None]

        def counter(name: str, text: str, field: str) -> Metric:
            family = CounterMetricFamily(name, text, labels=_OF_RANK)
            for rank in answering:
                family.add_metric(_labels(rank), rank["statistics"][field])
            return family

        def by_kind(name: str, text: str, field: str) -> Metric:
            family = CounterMetricFamily(name, text, labels=(*_OF_RANK, "kind"))
            for rank in answering:
                for kind, value in rank["statistics"][field].items():
                    family.add_metric((*_labels(rank), kind), value)
            return family

        def gauge(name: str, text: str, values: list[tuple[Any, float]]) -> Metric:
            family = GaugeMetricFamily(name, text, labels=_OF_RANK)
            for rank, value in values:
                family.add_metric(_labels(rank), value)
            return family

        yield gauge("collective_rank_up", "Whether the rank has answered.", [(r, float(r in answering)) for r in ranks])
        yield by_kind("collective_operations", "Operations finished without error.", "operations")
        yield by_kind("collective_bytes", "Payload of these operations on this rank.", "bytes")
        yield counter("collective_failed_operations", "Operations that ended in an error.", "failed")
        yield counter("collective_steps", "Training steps.", "steps")
        yield counter("collective_wait_seconds", "Time in which a thread waited for an operation.", "wait_seconds")
        yield counter("collective_in_flight_seconds", "Time in which an operation was in flight.", "in_flight_seconds")
        yield gauge(
            "collective_in_flight_operations",
            "Operations in flight.",
            [(rank, rank["statistics"]["in_flight"]) for rank in answering],
        )
        yield gauge(
            "collective_oldest_operation_age_seconds",
            "For how long the oldest operation in flight has been so; 0: there is none.",
            [(rank, (rank["statistics"]["oldest"] or {"seconds": 0.0})["seconds"]) for rank in answering],
        )
        late = CounterMetricFamily("collective_late_seconds", "Time that others waited for the rank.", labels=_OF_RANK)
        for rank in ranks:
            if rank["late_seconds"] is not None:
                late.add_metric(_labels(rank), rank["late_seconds"])
        yield late


def _labels(rank: dict[str, Any]) -> tuple[str, str]:
    return str(rank["rank"]), rank["host"]


class Server:
    """Serves /metrics over HTTP; OSError if the port cannot be had."""

    def __init__(self, host: str, port: int, report: Callable[[], dict[str, Any]]) -> None:
        registry = CollectorRegistry()
        registry.register(_OfJob(report))
        self._server, self._thread = start_http_server(port, host, registry)

    def close(self) -> None:
        """Give the port back."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def close_in_child(self) -> None:
        """After a fork: the port is the parent's."""
        self._server.socket.close()
