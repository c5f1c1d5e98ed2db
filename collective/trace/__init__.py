"""One trace of all ranks, for Perfetto and chrome://tracing: docs/tracing.md.

Each rank writes its part to a file of its own (part.py). At the end rank 0 gets the parts by messages of MPI and merges
them (merge.py). What a job leaves that is killed, `collective trace merge` merges (cli.py).
"""

from .session import start_trace, stop_trace

__all__ = ["start_trace", "stop_trace"]
