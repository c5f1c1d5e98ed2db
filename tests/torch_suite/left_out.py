"""The tests that cannot apply, and why. A failure of the backend does not belong here."""

from fnmatch import fnmatch

LEFT_OUT = {
    "test_monitored_barrier_*": "torch.distributed.monitored_barrier() refuses every backend but gloo by its name",
}
"""Reasons, by the names of the tests or patterns of them."""

WORDS = {
    " (Timed out|closed|timeout) ": "did not finish within",
}
"""What tests look for in gloo's errors, and what ours say in its place; all else in such a test is as torch has it."""


def reason(test: str) -> str | None:
    """Why the test is left out; None: it is run."""
    return next((text for pattern, text in LEFT_OUT.items() if fnmatch(test, pattern)), None)
