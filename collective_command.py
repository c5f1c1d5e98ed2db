"""The command `collective`, outside the package: so it can say in one paragraph why the package cannot be imported."""

import sys


def main() -> None:
    """Run collective.cli."""
    try:
        from collective.cli.main import main as command
    except ImportError as error:
        print(f"collective: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    command()
