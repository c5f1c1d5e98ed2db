"""DistributedOptimizer: an optimizer whose step() sees gradients reduced over all ranks."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .. import ops, runtime
from ..errors import InvalidArgumentError
from ..process_sets import ProcessSet, global_process_set
from ..submission import Adasum, Average, Op, Sum, checked_op
from .adasum import AdasumStep
from .buckets import Named
from .compression import Compression, Compressor
from .reducer import GradientReducer, check_passes

__all__ = ["DistributedOptimizer"]

OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)

# Optimizers wrapped so far, by process set: tells them apart in the agreement, alike on all ranks of the set.
_counts: dict[int | None, int] = {}


class _Distributed:
    """What DistributedOptimizer adds to the wrapped optimizer's class."""

    param_groups: list[dict[str, Any]]
    _reducer: GradientReducer
    _names: dict[torch.Tensor, str]
    _skip: bool
    _process_set: ProcessSet
    _adasum: AdasumStep | None = None

    def synchronize(self) -> None:
        """Wait until the gradients of all ranks are reduced into `.grad`; collective.

        For what must see reduced gradients before the step, such as clipping. The step that follows does not reduce
        them again, with or without `skip_synchronize()`.
        """
        if self._adasum is not None:
            return  # gradients stay local
        self._reducer.synchronize()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Within it, step() uses the gradients as they are."""
        if self._adasum is not None:
            raise InvalidArgumentError("skip_synchronize() has no meaning with op=Adasum: gradients stay local")
        self._skip = True
        try:
            yield
        finally:
            self._skip = False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, backward passes only accumulate; the first pass after it completes the gradients."""
        previous, self._reducer.enabled = self._reducer.enabled, False
        try:
            yield
        finally:
            self._reducer.enabled = previous

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change how many backward passes make up a gradient; between steps, alike on all ranks."""
        self._reducer.passes = check_passes(passes)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a DistributedOptimizer cannot be copied or pickled; save its state_dict()")

    def _parameters(self) -> list[Named]:
        """What the optimizer holds now: groups may have been added, parameters frozen or unfrozen."""
        parameters = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    name = self._names.get(p) or self._names.setdefault(p, f"parameter.{len(self._names)}")
                    parameters.append((name, p))
        return parameters

    def _before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if self._adasum is not None:
            self._adasum.before()
            return None
        if self._skip:
            self._reducer.synchronized = False
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self.synchronize()
            self._reducer.synchronized = False
            return None
        # The closure computes the gradients, so they are reduced inside it.
        wrapped = self._wrap(closure)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def synchronized() -> Any:
            loss = closure()
            self.synchronize()
            self._reducer.synchronized = False
            if isinstance(self, torch.optim.LBFGS):
                # Its line search decides by the loss, and must decide alike everywhere.
                loss = ops.allreduce(torch.as_tensor(loss).detach(), Average, process_set=self._process_set)
            return loss

        return synchronized


def _synchronize_before_unscaling() -> None:
    """Have GradScaler see reduced gradients: then all ranks find the same infinities, and all or none step.

    Its unscale_() changes gradients without a trace (their version stays), after buckets have started.
    """
    unscale = torch.amp.GradScaler.unscale_

    @functools.wraps(unscale)
    def unscale_(self: Any, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, _Distributed) and self._enabled:
            optimizer.synchronize()
        unscale(self, optimizer)

    torch.amp.GradScaler.unscale_ = unscale_  # type: ignore[method-assign]


_synchronize_before_unscaling()


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: OptimizerT,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: type[Compressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | list[list[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
    gradient_as_bucket_view: bool | None = None,
) -> OptimizerT:
    """Make an optimizer reduce gradients over all ranks before each step, overlapped with backward.

    The optimizer itself is changed and returned: state, schedulers and references to it stay valid, and it stays an
    instance of its class.

    Args:
        optimizer: any torch optimizer; the same class with the same parameters in the same order on all ranks.
        named_parameters: usually `model.named_parameters()`: names for messages. Names are unique; with names given,
            every parameter of the optimizer has one.
        compression: `Compression.none`, `.fp16` or `.bf16`: how float32 and float64 gradients travel.
        backward_passes_per_step: backward passes that are summed into one gradient. step() may come earlier.
        op: Average, Sum, or Adasum: then each rank makes its step alone, and the changes that it made to the parameters
            are combined (arXiv 2006.02924).
        gradient_predivide_factor: with Average, gradients are divided by it before and multiplied after the sum.
        num_groups: old name of `groups` as a number.
        groups: which gradients travel together: a number of buckets to make of all parameters in order, or lists of
            parameters that share one each; the rest is dealt by size.
        sparse_as_dense: turn sparse gradients into dense ones before they are reduced; else they are gathered.
        process_set: the ranks that train together; all others must not call this.
        gradient_as_bucket_view: after synchronize() or step(), `.grad` is a view of the memory in which gradients were
            reduced, and the next reduction overwrites it; on a device, streams that read it beside the current one must
            be waited for before the next backward.
            None: so where zero_grad() sets gradients to None and they are no parts of larger buffers; else results are
            copied into the gradients, which stay the tensors that they are.
            True: always, and a gradient that is still there when backward adds to it, as after
            `zero_grad(set_to_none=False)`, is reduced in place, without any copy. It must not be read or changed
            between backward and synchronize(), nor may a backward pass come that `backward_passes_per_step` or
            no_sync() does not tell of: that raises GradientChangedError on all ranks.
            False: results are always copied.
            With `compression`, what is compressed is always copied.

    Returns:
        `optimizer`, with these methods added: synchronize(), skip_synchronize(), no_sync(),
        set_backward_passes_per_step(n).

    Raises:
        InvalidArgumentError: for what is wrong on this rank.
        MismatchError: from the first backward or step, on every rank, when parameters differ between ranks; it names
            the first that does.
    """
    runtime.current()
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgumentError(f"expected a torch.optim.Optimizer, got {type(optimizer).__qualname__}")
    if isinstance(optimizer, _Distributed):
        raise InvalidArgumentError("the optimizer is a DistributedOptimizer already")
    checked = checked_op(op)
    if checked not in (Average, Sum, Adasum):
        raise InvalidArgumentError(f"DistributedOptimizer reduces by Average, Sum or Adasum, not by {checked.name}")
    if not process_set.included():
        raise InvalidArgumentError(f"rank {runtime.rank()} is not in {process_set}")
    if num_groups:
        warnings.warn("num_groups is deprecated, use groups", DeprecationWarning, stacklevel=2)
        if groups is not None:
            raise InvalidArgumentError("num_groups= and groups= were both given; groups= alone says it all")
        groups = num_groups
    if not gradient_predivide_factor > 0:
        raise InvalidArgumentError(f"gradient_predivide_factor is positive, not {gradient_predivide_factor}")
    if not isinstance(compression, type) or not issubclass(compression, Compressor):
        raise InvalidArgumentError(f"compression is Compression.none, .fp16 or .bf16, not {compression!r}")
    if gradient_predivide_factor != 1.0 and checked is not Average:
        raise InvalidArgumentError("gradient_predivide_factor is defined for op=Average only")
    names = _checked_names(optimizer, named_parameters)
    passes = check_passes(backward_passes_per_step)
    dealt = _checked_groups(optimizer, groups)
    number = _counts.get(process_set.process_set_id, 0)
    _counts[process_set.process_set_id] = number + 1
    label = f"optimizer.{number}"
    optimizer.__class__ = type(type(optimizer).__name__, (_Distributed, type(optimizer)), {})
    wrapped: Any = optimizer
    wrapped._names = names
    wrapped._skip = False
    wrapped._process_set = process_set
    if checked is Adasum:
        wrapped._adasum = AdasumStep(optimizer, names, label, compression, process_set)
    reference = weakref.ref(wrapped)  # the optimizer owns the reducer, not the other way round

    def parameters() -> list[Named]:
        alive = reference()
        assert alive is not None
        found: list[Named] = alive._parameters()
        return found

    wrapped._reducer = GradientReducer(
        label,
        parameters,
        compression=compression,
        op=Op(checked),
        prescale=1.0 / gradient_predivide_factor,
        postscale=gradient_predivide_factor,
        passes=passes,
        sparse_as_dense=sparse_as_dense,
        process_set=process_set,
        groups=dealt,
        as_view=gradient_as_bucket_view,
    )
    wrapped._step_supports_amp_scaling = False  # fused kernels: the scaler is to use unscale_()
    if wrapped._adasum is not None:
        optimizer.register_step_post_hook(lambda opt, args, kwargs: opt._adasum.after())
    # A hook rather than an override: schedulers that were made before put their own step() in front of the class's.
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: opt._before_step(args, kwargs))
    return optimizer


def _checked_names(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.Tensor]] | None
) -> dict[torch.Tensor, str]:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if named_parameters is None:
        return {p: f"parameter.{number}" for number, p in enumerate(held)}
    pairs = list(named_parameters)
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise InvalidArgumentError("named_parameters are pairs (name, parameter), as from model.named_parameters()")
    names = {p: name for name, p in pairs}
    counted = [name for name, _ in pairs]
    duplicates = sorted({name for name in counted if counted.count(name) > 1})
    if duplicates:
        raise InvalidArgumentError(f"named_parameters: these names stand for several: {', '.join(duplicates)}")
    unnamed = [number for number, p in enumerate(held) if p not in names]
    if unnamed:
        raise InvalidArgumentError(
            f"named_parameters: parameters number {', '.join(map(str, unnamed))} of the optimizer have no name"
        )
    return names


def _checked_groups(
    optimizer: torch.optim.Optimizer, groups: int | list[list[torch.Tensor]] | None
) -> int | list[list[Any]] | None:
    if groups is None or isinstance(groups, int):
        if isinstance(groups, int) and groups < 0:
            raise InvalidArgumentError(f"groups={groups} is negative")
        return groups
    held = {p for group in optimizer.param_groups for p in group["params"]}
    listed = [p for group in groups for p in group]
    if any(not isinstance(p, torch.Tensor) or p not in held for p in listed) or len(set(listed)) < len(listed):
        raise InvalidArgumentError("groups= is a number, or lists of distinct parameters of the optimizer")
    return [list(group) for group in groups]
