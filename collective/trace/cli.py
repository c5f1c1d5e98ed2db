"""collective trace: what can be done with traces."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import InvalidArgumentError
from .merge import merge

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Do it. Returns the status: 1 where parts cannot be merged."""
    parser = argparse.ArgumentParser(prog="collective trace", description="Handles traces of all ranks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = "Makes one trace of the parts that the ranks of a job have left."
    merging = commands.add_parser("merge", help=about, description=about)
    merging.add_argument("parts", nargs="+", type=Path, metavar="FILE", help="a rank's part, such as t.rank3.json")
    merging.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="the trace; .gz: compressed")
    options = parser.parse_args(argv)
    try:
        remarks = merge([(str(part), part.read_bytes()) for part in options.parts], options.output)
    except (InvalidArgumentError, OSError) as error:
        print(f"collective trace merge: {error}", file=sys.stderr)
        return 1
    for remark in remarks:
        print(f"collective trace merge: {remark}", file=sys.stderr)
    print(f"{options.output}: {len(options.parts)} parts")
    return 0
