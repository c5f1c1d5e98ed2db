"""What is wrong with a set-up, found before a training does.

python -m collective.doctor                        # this process and its machine
mpirun -np 4 python -m collective.doctor           # the ranks, their hosts, and what lies between them

Each line is `ok`, `warn` or `fail`, with the remedy below it; --json FILE writes the same for programs. The status is
1, on all ranks, if anything fails.
"""

from .cli import main

__all__ = ["main"]
