"""The tests that cannot apply, and why. A failure of the backend does not belong here."""

from fnmatch import fnmatch

LEFT_OUT = {
    "test_monitored_barrier_*": "torch.distributed.monitored_barrier() refuses every backend but gloo by its name",
}
"""Reasons, by the names of the tests or patterns of them."""


def reason(test: str) -> str | None:
    """Why the test is left out; None: it is run."""
    return next((text for pattern, text in LEFT_OUT.items() if fnmatch(test, pattern)), None)
