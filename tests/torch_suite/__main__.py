"""The command line: starts the jobs and makes a table of what they tell, or is itself one of the ranks of a job."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path

from harness import mpirun

from .ranks import Outcome, leave, run_all

Table = dict[str, Outcome]


def all_tests() -> list[str]:
    """The names of torch's tests, from a process of its own: an import of them is for one backend."""
    command = [sys.executable, "-m", "torch_suite.ranks"]
    cwd = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=cwd, env=mpirun.environment(), capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(done.stderr)
    return [line for line in done.stdout.splitlines() if line.startswith("test_")]


def job(size: int, backend: str, like: str, tests: Sequence[str]) -> list[Outcome]:
    """Run the tests in one job, which ends after one that fails, hangs or crashes; the outcomes as far as it came."""
    with tempfile.TemporaryDirectory(prefix="torch_suite-") as directory:
        order, results, shared = (Path(directory, name) for name in ("order", "results", "shared"))
        shared.mkdir()
        content = {"backend": backend, "like": like, "tests": tests, "results": str(results), "directory": str(shared)}
        order.write_text(json.dumps(content))
        results.touch()
        with open(Path(directory, "output"), "w+", errors="replace") as output:
            arguments = ["-m", "torch_suite.ranks", str(order)]
            cwd = Path(__file__).parent.parent
            process = mpirun.start(size, arguments, cwd=cwd, stdout=output, stderr=subprocess.STDOUT)
            try:
                process.wait()
            except BaseException:  # Ctrl-C
                mpirun.end_job(process)
                raise
            output.seek(0)
            printed = output.read()
        lines = [json.loads(line) for line in results.read_text().splitlines()]
    outcomes = [Outcome(**line) for line in lines if "outcome" in line]
    if lines and "outcome" not in lines[-1]:
        detail = f"{printed[-20000:]}\nthe job hung or crashed"
        outcomes.append(Outcome(lines[-1]["test"], "failed", detail))
    if not lines:
        raise SystemExit(f"the ranks did not start:\n{printed}")
    return outcomes


def run(size: int, backend: str, like: str, tests: Sequence[str]) -> Table:
    """The outcomes of the tests. One that fails after others in its job is run once more in a job of its own."""
    table: Table = {}
    rest = list(tests)
    while rest:
        outcomes = job(size, backend, like, rest)
        last = outcomes[-1]
        if last.outcome == "failed" and len(outcomes) > 1:
            print(f"  {last.test} failed, once more alone", file=sys.stderr, flush=True)
            again = job(size, backend, like, [last.test])[0]
            if again.outcome == "passed":
                again = replace(again, detail=f"passed alone, failed after other tests: {last.detail}")
            outcomes[-1] = again
        table.update((outcome.test, outcome) for outcome in outcomes)
        rest = [test for test in rest if test not in table]
        print(f"{backend} as {like}: {len(rest)} tests to go", file=sys.stderr, flush=True)
    return table


def run_ours(size: int, tests: Sequence[str]) -> Table:
    """As if for gloo, and what is skipped there as if for torch's MPI backend."""
    table = run(size, "collective", "gloo", tests)
    skipped = [test for test in tests if table[test].outcome == "skipped"]
    if skipped:
        more = run(size, "collective", "mpi", skipped)
        table.update((test, outcome) for test, outcome in more.items() if outcome.outcome != "skipped")
    return table


def count(table: Table, what: str) -> int:
    """The tests that went so."""
    return sum(outcome.outcome == what for outcome in table.values())


def print_table(title: str, table: Table) -> None:
    """Numbers, and why for each test that has not passed."""
    kinds = ("passed", "failed", "skipped", "left out")
    print(f"{title}: {', '.join(f'{count(table, kind)} {kind}' for kind in kinds)}, of {len(table)}")
    for kind in kinds:
        for test, outcome in sorted(table.items()):
            if outcome.outcome == kind and (kind != "passed" or outcome.detail):
                print(f"  {kind:8} {test}: {_last_line(outcome.detail)}")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""


def compare(ours: Table, gloo: Table) -> tuple[int, int]:
    """Print what gloo passes and we do not. Returns how many gloo passes, and how many of those we pass."""
    theirs = [test for test, outcome in gloo.items() if outcome.outcome == "passed"]
    missing = [test for test in theirs if ours[test].outcome != "passed"]
    passed = len(theirs) - len(missing)
    percent = 100 * passed / max(1, len(theirs))
    print(f"of the {len(theirs)} tests that gloo passes {passed} pass here: {percent:.1f} %")
    for test in missing:
        print(f"  {ours[test].outcome:8} {test}: {_last_line(ours[test].detail)}")
    return len(theirs), passed


def main() -> int:
    parser = argparse.ArgumentParser(prog="torch_suite", description=__doc__)
    parser.add_argument("-k", metavar="PATTERN", action="append", help="tests whose name has it, or matches it")
    parser.add_argument("--test", metavar="NAME", action="append", help="a test, by its whole name")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the outcomes there")
    parser.add_argument("--np", metavar="N", type=int, default=3, help="the ranks to start (3)")
    parser.add_argument("--backend", default="collective", choices=["collective", "gloo"])
    parser.add_argument("--like", default="gloo", choices=["gloo", "mpi"], help="in ranks that are there already")
    parser.add_argument("--compare", action="store_true", help="with gloo as well")
    options = parser.parse_args()

    def wanted(test: str) -> bool:
        if not options.k and not options.test:
            return True
        named = test in (options.test or [])
        return named or any(pattern in test or fnmatch(test, pattern) for pattern in options.k or [])

    if mpirun.under_mpi():
        return _as_rank(options, wanted)
    tables: dict[str, Table] = {}
    tests = [test for test in all_tests() if wanted(test)]
    if not tests:
        parser.error("no test has such a name")
    if options.compare or options.backend == "gloo":
        tables["gloo"] = run(options.np, "gloo", "gloo", tests)
    if options.compare or options.backend == "collective":
        tables["collective"] = run_ours(options.np, tests)
    for title, table in tables.items():
        print_table(title, table)
    if options.compare:
        compare(tables["collective"], tables["gloo"])
    _write(options.json, tables)
    return int(count(tables[options.backend], "failed") > 0)


def _write(file: Path | None, tables: dict[str, Table]) -> None:
    if file is not None:
        content = {title: [asdict(outcome) for outcome in table.values()] for title, table in tables.items()}
        file.write_text(json.dumps(content, indent=1))


def _as_rank(options: argparse.Namespace, wanted: Callable[[str], bool]) -> int:
    table: Table = {}

    def report(test: str, outcome: Outcome | None) -> None:
        if outcome is not None:
            table[test] = outcome
            print(f"{outcome.outcome:8} {test} {outcome.seconds:.1f} s", flush=True)

    good = run_all(options.backend, options.like, wanted, report)
    if table:  # on rank 0
        print_table(options.backend, table)
        _write(options.json, {options.backend: table})
    if not good:
        leave(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
