"""What a test's markers say, and how the reports of its ranks become the reports of one item."""

from collections.abc import Collection, Sequence
from typing import Any

import pytest

DEFAULT_LIMIT = 60.0  # seconds

Reports = list[pytest.TestReport]


def rank_counts(node: pytest.Item) -> list[int]:
    """The world sizes of its `ranks` marker, ascending; none without the marker."""
    marker = node.get_closest_marker("ranks")
    if marker is None:
        return []
    if not marker.args or not all(type(size) is int and size > 0 for size in marker.args):
        raise pytest.UsageError(f"{node.nodeid}: ranks(...) takes world sizes, such as ranks(1, 2): {marker}")
    return sorted(set(marker.args))


def world_size(item: pytest.Item) -> int:
    """The number of ranks this item runs on; 0 for an unmarked test."""
    if item.get_closest_marker("ranks") is None:
        return 0
    callspec = getattr(item, "callspec", None)
    if callspec is None or "ranks" not in callspec.params:
        raise pytest.UsageError(f"{item.nodeid}: ranks(...) can only mark a plain function or method")
    return int(callspec.params["ranks"])


def limit(item: pytest.Item) -> float:
    """Seconds until it counts as a hang: its `limit` marker, else 60."""
    marker = item.get_closest_marker("limit")
    return DEFAULT_LIMIT if marker is None else float(marker.args[0])


def named(ranks: Collection[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def pack(config: pytest.Config, report: pytest.TestReport) -> dict[str, Any]:
    """A report in JSON's types."""
    data: dict[str, Any] = config.hook.pytest_report_to_serializable(config=config, report=report)
    return data


def unpack(config: pytest.Config, ranks: Sequence[Sequence[dict[str, Any]]]) -> list[Reports]:
    """The reports of each rank, from what `pack` and perhaps JSON have made of them."""
    ranks_reports = []
    for sent in ranks:
        reports = [config.hook.pytest_report_from_serializable(config=config, data=data) for data in sent]
        for report in reports:
            if isinstance(report.longrepr, list):
                report.longrepr = tuple(report.longrepr)  # where and why it was skipped; JSON has no tuples
        ranks_reports.append(reports)
    return ranks_reports


def in_step(ranks: Sequence[Reports]) -> bool:
    """Whether all ranks went the same way through the item to a regular end, and so can run the next one."""
    ways = [[(r.when, r.outcome, hasattr(r, "wasxfail")) for r in reports] for reports in ranks]
    left = any(outcome == "failed" or (outcome == "skipped" and xfail) for _, outcome, xfail in ways[0])
    return not left and all(way == ways[0] for way in ways)


def merge(ranks: Sequence[Reports]) -> Reports:
    """The item's reports: those of the first rank that failed, else that skipped, else of rank 0.

    So an item passes only if it ran to its end on all ranks. A failure tells which ranks failed, the
    traceback of the first, a line for each other, and what they printed. A phase takes as long as on the
    slowest rank.
    """
    outcomes = [{report.outcome for report in reports} for reports in ranks]
    failed = [rank for rank, of in enumerate(outcomes) if "failed" in of]
    skipped = [rank for rank, of in enumerate(outcomes) if "skipped" in of]
    chosen = (failed or skipped or [0])[0]
    for phase, report in enumerate(ranks[chosen]):
        report.duration = max(reports[phase].duration for reports in ranks if phase < len(reports))
    if failed:
        failures = {rank: next(r for r in ranks[rank] if r.outcome == "failed") for rank in failed}
        ended = [bool(reports) and reports[-1].when == "teardown" for reports in ranks]
        unfinished = [rank for rank in range(len(ranks)) if not ended[rank]]
        _explain(failures, unfinished, len(ranks))
    return list(ranks[chosen])


def _explain(failures: dict[int, pytest.TestReport], unfinished: list[int], size: int) -> None:
    """Tell in the first of the failures about all others."""
    first, report = next(iter(failures.items()))
    lines = [f"failed on {named(list(failures))} of {size}; the traceback above is of rank {first}"]
    lines += [f"rank {rank}: {other.when}: {_line(other)}" for rank, other in failures.items()][1:]
    if unfinished:
        lines.append(f"still running when this world was ended: {named(unfinished)}")
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        crash.message = f"rank {first}: {crash.message}"  # of pytest's short summary
    add_section: Any = getattr(report.longrepr, "addsection", None)
    if add_section is not None:
        add_section("ranks", "\n".join(lines))
    else:
        report.longrepr = "\n".join([str(report.longrepr), *lines])
    report.sections = [
        (f"{name} (rank {rank})", text) for rank, other in failures.items() for name, text in other.sections
    ]


def _line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return report.longreprtext.strip().rpartition("\n")[2]
    return f"{crash.message.partition(chr(10))[0]} ({crash.path}:{crash.lineno})"


def broken(
    item: pytest.Item, trouble: str, ranks: Sequence[Reports], outputs: dict[str, str], duration: float
) -> Reports:
    """The reports of an item that did not come to its end: what happened, and the last words of everybody."""
    lines = [trouble]
    for rank, reports in enumerate(ranks):
        lines += [f"rank {rank}: {report.when}: {_line(report)}" for report in reports if report.failed]
    failures = [
        (f"Failure of rank {rank}", report.longreprtext)
        for rank, reports in enumerate(ranks)
        for report in reports
        if report.failed
    ]
    sections = failures + [(f"Output of {name}", text) for name, text in outputs.items() if text.strip()]

    def phase(when: Any, outcome: Any, longrepr: str | None) -> pytest.TestReport:
        names: Any = dict.fromkeys(item.keywords, 1)
        shown, seconds = (sections, duration) if longrepr else ([], 0.0)
        return pytest.TestReport(item.nodeid, item.location, names, outcome, longrepr, when, shown, seconds)

    return [
        phase("setup", "passed", None),
        phase("call", "failed", "\n".join(lines)),
        phase("teardown", "passed", None),
    ]
