"""torch.compile and this backend."""

from __future__ import annotations

__all__ = ["leave_alone"]


def leave_alone(*kinds: type) -> None:
    """Have torch.compile run the methods of these classes as they are, and all that they call.

    Its hook sees every Python function that starts within a compiled region, those that torch's C++ calls among them:
    DDP's reducer calls broadcast() in forward(). There is nothing in them to compile, and Dynamo fails on a process
    group's attributes. torch._dynamo.disable() would do the same, but imports all of Dynamo, which takes seconds.
    """
    try:
        from torch._C._dynamo.eval_frame import (  # type: ignore[import-not-found, unused-ignore]
            _FrameAction,
            _FrameExecStrategy,
            set_code_exec_strategy,
        )
    except ImportError:  # torch before 2.7
        return
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    for kind in kinds:
        for member in vars(kind).values():
            function = member.fget if isinstance(member, property) else member
            code = getattr(function, "__code__", None)
            if code is not None:
                set_code_exec_strategy(code, skip)
