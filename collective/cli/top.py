"""`collective top`: how the ranks of a running job are."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from .. import jobs
from ..jobs import Ended, Entry
from .options import Problem
from .printable import printable

__all__ = ["top"]


class TopProblem(Problem):
    """There is nothing to be shown."""

    command = "collective top"


@click.command(epilog="Example: collective top 4711 --interval 5 --limit 10")
@click.argument("job", required=False)
@click.option("--once", is_flag=True, help="Print one table, of the time since the job's start, and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON in place of each table.")
@click.option("--interval", type=click.FloatRange(min=0.1), default=2.0, help="Seconds between tables.  [default: 2]")
@click.option("--limit", type=click.IntRange(min=1), default=20, help="Show so many ranks, the worst.  [default: 20]")
def top(job: str | None, once: bool, as_json: bool, interval: float, limit: int) -> None:
    """Show what the ranks of JOB do: steps, communication, who is late or silent.

    Run it on the host of rank 0, as the user of the job. JOB is its name as listed, Slurm's number of the job, or the
    process id of rank 0; without it, the only job that runs here.
    """
    if not as_json and importlib.util.find_spec("rich") is None:
        raise TopProblem("rich is not installed; pip install 'collective[top]' brings it. --json does without it.")
    entry = _find(job)
    before = None
    try:
        with _json() if as_json else _tables(live=not once, limit=limit) as show:
            while True:
                report = {"at": time.time(), **_ask(entry)}
                show(report, before)
                if once:
                    break
                before = report
                time.sleep(interval)
    except KeyboardInterrupt:
        return


Show = Callable[[dict[str, Any], dict[str, Any] | None], None]


@contextlib.contextmanager
def _json() -> Iterator[Show]:
    yield lambda report, before: click.echo(json.dumps(report))


def _tables(live: bool, limit: int) -> contextlib.AbstractContextManager[Show]:
    from .top_table import screen

    return screen(live, limit)


def _find(job: str | None) -> Entry:
    """The one that is meant."""
    try:
        found = jobs.entries()
    except PermissionError as error:
        raise TopProblem(f"{error.strerror}: somebody else has made it, and what is in it is not trusted.") from None
    if job is not None:
        found = [entry for entry in found if entry.is_called(job)]
    running = [entry for entry in found if entry.is_alive()]
    if len(running) == 1:
        return running[0]
    if running:
        which = "several jobs of yours run here" if job is None else f"job {job} has several parts"
        raise TopProblem(f"{which}; name one: {'; '.join(map(_described, running))}.")
    if found and job is not None:
        raise TopProblem(f"job {job} has ended.")
    raise TopProblem(_why_none(job))


def _described(entry: Entry) -> str:
    try:
        about = entry.ask("job")
    except (Ended, OSError):  # it has ended just now, or is stopped
        return f"{entry.name} (rank 0 does not answer)"
    return f"{entry.name} ({printable(about['program'])}, {about['ranks']} ranks)"


def _why_none(job: str | None) -> str:
    elsewhere = (
        "A job is seen on the host of its rank 0, by its own user, from init() on, unless COLLECTIVE_OUT_OF_BAND=0."
    )
    if job is None:
        return f"no job of yours runs on this host. {elsewhere}"
    if (other := jobs.other_owner(job)) is not None:
        what, uid = other
        return f"{what} belongs to user {uid}, and only that user may look at it."
    return f"no job {job} runs on this host. {elsewhere} Under Slurm: srun --overlap --jobid={job} collective top {job}"


def _ask(entry: Entry) -> dict[str, Any]:
    try:
        report: dict[str, Any] = entry.ask("report")
        return report
    except Ended:
        raise TopProblem(f"job {entry.name} has ended.") from None
    except OSError as error:
        raise TopProblem(
            f"rank 0 of job {entry.name} does not answer: {error.strerror or error}. Is it stopped? "
            f"The state of its process: ps -o stat= -p {entry.name.rpartition('.')[2]}"
        ) from None
