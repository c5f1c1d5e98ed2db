"""DistributedOptimizer: an optimizer whose step() sees gradients reduced over all ranks."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .. import arrays, ops, runtime
from ..errors import InvalidArgumentError, UnsupportedTypeError
from ..process_sets import ProcessSet, global_process_set
from ..steps import mark_step
from ..submission import Adasum, Average, Op, Sum, checked_op
from .adasum import AdasumStep
from .base_reducer import BaseReducer
from .buckets import Named
from .compressed import CompressedReducer
from .compression import Compression, Compressor, is_compressor, is_custom
from .reducer import GradientReducer, check_passes
from .replicas import check_optimizer

__all__ = ["DistributedOptimizer"]

OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)


class _Label:
    """Tells optimizers apart in the agreement: by the order in which ranks made them, or first used them after init()
    has started the runtime again."""

    def __init__(self, process_set: ProcessSet) -> None:
        self._process_set = process_set
        self._text = ""
        self._state: Any = None

    def __call__(self) -> str:
        state = runtime.current()
        if self._state is not state:
            self._state = state
            self._text = f"optimizer.{state.next_number('optimizer', self._process_set.process_set_id or 0)}"
        return self._text


class _Distributed:
    """What DistributedOptimizer adds to the wrapped optimizer's class."""

    param_groups: list[dict[str, Any]]
    _reducer: BaseReducer
    _names: dict[torch.Tensor, str]
    _skip: bool
    _process_set: ProcessSet
    _adasum: AdasumStep | None = None

    @property
    def backward_passes_per_step(self) -> int:
        """How many backward passes make up a gradient."""
        return self._reducer.passes

    def synchronize(self) -> None:
        """Wait until the gradients of all ranks are reduced into `.grad`; collective.

        For code that must see reduced gradients before the step, such as clipping. The next step does not reduce them
        again, with or without `skip_synchronize()`.
        """
        if self._adasum is not None:
            return  # gradients stay local
        self._reducer.synchronize()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Inside this context, step() uses the gradients as they are."""
        if self._adasum is not None:
            raise InvalidArgumentError("skip_synchronize() has no meaning with op=Adasum: gradients stay local")
        self._skip = True
        try:
            yield
        finally:
            self._skip = False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside this context, backward passes only accumulate; the first pass after it completes the gradients."""
        previous, self._reducer.enabled = self._reducer.enabled, False
        try:
            yield
        finally:
            self._reducer.enabled = previous

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change how many backward passes make up a gradient; between steps, and to the same number on all ranks."""
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
            self._synchronize_for_step()
            return None
        # The closure computes the gradients, so they are reduced inside it.
        wrapped = self._wrap(closure)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

    def _synchronize_for_step(self) -> None:
        try:
            self.synchronize()
        finally:  # even after an error, which may be this rank's alone
            self._reducer.synchronized = False

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def synchronized() -> Any:
            loss = closure()
            self._synchronize_for_step()
            if isinstance(self, torch.optim.LBFGS) and self._process_set.included():
                # Its line search decides by the loss, and must decide the same everywhere. A float stays one, of
                # double precision, as all Python floats.
                is_tensor = isinstance(loss, torch.Tensor)
                mean = ops.allreduce(loss if is_tensor else float(loss), process_set=self._process_set)
                loss = mean if is_tensor else float(mean)
            return loss

        return synchronized


def _synchronize_before_unscaling() -> None:
    """Have GradScaler see reduced gradients: then all ranks find the same infinities, and either all or none step.

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
    check_replicas_every: int = 0,
) -> OptimizerT:
    """Make an optimizer reduce gradients over all ranks before each step, overlapped with backward.

    The optimizer itself is changed and returned: state, schedulers and references to it stay valid, and it stays an
    instance of its class.

    Args:
        optimizer: any torch optimizer; the same class with the same parameters in the same order on all ranks.
        named_parameters: usually `model.named_parameters()`: names for messages. Names are unique; if given, every
            parameter of the optimizer has one.
        compression: `Compression.none`, `.fp16` or `.bf16`: how float32 and float64 gradients travel; or a `Compressor`
            of your own, whose methods are called for each gradient, which then travels by itself (`groups` and
            `gradient_as_bucket_view` have no effect, and sparse gradients travel dense).
        backward_passes_per_step: backward passes that are summed into one gradient. step() may come earlier.
        op: Average, Sum, or Adasum: then each rank steps alone, and the changes that the steps made to the parameters
            are combined (arXiv 2006.02924).
        gradient_predivide_factor: with Average, gradients are divided by it before the sum and multiplied after it.
        num_groups: old name of `groups` as a number.
        groups: which gradients travel together: the number of buckets to make of all parameters in order, or lists of
            parameters, each of which shares a bucket; the rest is dealt by size.
        sparse_as_dense: turn sparse gradients into dense ones before they are reduced (for SparseAdam they are sparse
            again afterwards); else they are gathered.
        process_set: the ranks that train together; on other ranks the optimizer stays local.
        gradient_as_bucket_view: after synchronize() or step(), `.grad` is a view of the memory in which gradients were
            reduced. On a device, streams other than the current one that read it must be waited for before the
            next backward.
            None: it is one if zero_grad() sets gradients to None and they are not parts of larger buffers; else results
            are copied into the gradients, which stay the same tensors. A script may keep a gradient: it then gets
            memory of its own before the next reduction. (Other tensors and arrays over that memory, as made by
            `grad.detach()`, `grad.numpy()` or DLPack, are overwritten, with a warning.)
            True: always. The next reduction overwrites it, and a gradient that is still there when backward adds to it,
            as after `zero_grad(set_to_none=False)`, is reduced in place, without any copy. It must not be read or
            changed between backward and synchronize(), nor may a backward pass come that was not announced by
            `backward_passes_per_step` or no_sync(): that raises GradientChangedError on all ranks.
            False: results are always copied.
            With `compression`, compressed gradients are always copied.
        check_replicas_every: after every so many steps compare the optimizer's parameters, state and options between
            ranks, as `check_replicas` does; where they differ, step() raises ReplicaError on all ranks. With
            op=Adasum the state is each rank's own and left out. 0: never.

    Returns:
        `optimizer`, with these methods added: synchronize(), skip_synchronize(), no_sync(),
        set_backward_passes_per_step(n).

    Raises:
        InvalidArgumentError: an argument is wrong on this rank.
        MismatchError: from the first backward or step, on every rank, when parameters differ between ranks; it names
            the first that differs.
    """
    runtime.current()
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgumentError(f"expected a torch.optim.Optimizer, got {type(optimizer).__qualname__}")
    if isinstance(optimizer, _Distributed):
        raise InvalidArgumentError("the optimizer is already a DistributedOptimizer")
    checked = checked_op(op)
    if checked not in (Average, Sum, Adasum):
        raise InvalidArgumentError(f"DistributedOptimizer reduces by Average, Sum or Adasum, not by {checked.name}")
    if num_groups:
        warnings.warn("num_groups is deprecated, use groups", DeprecationWarning, stacklevel=2)
        if groups is not None:
            raise InvalidArgumentError("num_groups= and groups= were both given; groups= alone says it all")
        groups = num_groups
    if not gradient_predivide_factor > 0:
        raise InvalidArgumentError(f"gradient_predivide_factor must be positive, not {gradient_predivide_factor}")
    if not is_compressor(compression):
        raise InvalidArgumentError(
            f"compression is Compression.none, .fp16, .bf16 or a Compressor of your own, not {compression!r}"
        )
    if gradient_predivide_factor != 1.0 and checked is not Average:
        raise InvalidArgumentError("gradient_predivide_factor is defined for op=Average only")
    if not isinstance(check_replicas_every, int) or check_replicas_every < 0:
        raise InvalidArgumentError(f"check_replicas_every is a number of steps, or 0, not {check_replicas_every!r}")
    names = _checked_names(optimizer, named_parameters)
    passes = check_passes(backward_passes_per_step)
    dealt = _checked_groups(optimizer, groups)
    label = _Label(process_set)
    label()  # counted now: hooks would count in the order of gradients, which differs between ranks
    methods = {name: _outside_graphs(vars(_Distributed)[name]) for name in ("synchronize", "_before_step")}
    optimizer.__class__ = type(type(optimizer).__name__, (_Distributed, type(optimizer)), methods)
    wrapped: Any = optimizer
    wrapped._names = names
    wrapped._skip = False
    wrapped._process_set = process_set
    if checked is Adasum and process_set.included():
        wrapped._adasum = AdasumStep(optimizer, names, label, compression, process_set)
    reference = weakref.ref(wrapped)  # the optimizer owns the reducer, not the other way round

    def parameters() -> list[Named]:
        alive = reference()
        assert alive is not None
        found: list[Named] = alive._parameters()
        return found

    takes_sparse = isinstance(optimizer, torch.optim.SparseAdam)  # and nothing else
    options: dict[str, Any] = {
        "compression": compression,
        "op": Op(checked),
        "prescale": 1.0 / gradient_predivide_factor,
        "postscale": gradient_predivide_factor,
        "passes": passes,
        "sparse_as_dense": sparse_as_dense,
        "process_set": process_set,
    }
    if is_custom(compression):
        options["sparse_again"] = takes_sparse or not sparse_as_dense
        wrapped._reducer = CompressedReducer(label, parameters, **options)
    else:
        options["sparse_again"] = takes_sparse
        wrapped._reducer = GradientReducer(label, parameters, **options, groups=dealt, as_view=gradient_as_bucket_view)
    wrapped._step_supports_amp_scaling = False  # fused kernels: the scaler is to use unscale_()
    if wrapped._adasum is not None:
        optimizer.register_step_post_hook(_outside_graphs(lambda opt, args, kwargs: opt._adasum.after()))
    if check_replicas_every and process_set.included():
        guard = _ReplicaGuard(check_replicas_every, process_set)
        optimizer.register_step_post_hook(_outside_graphs(lambda opt, args, kwargs: guard.after_step(opt)))
    optimizer.register_step_post_hook(_outside_graphs(lambda opt, args, kwargs: mark_step()))
    # A hook rather than an override: schedulers made earlier have put their own step() in front of the class's.
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: opt._before_step(args, kwargs))
    return optimizer


class _ReplicaGuard:
    """Compares replicas after every n-th step."""

    def __init__(self, every: int, process_set: ProcessSet) -> None:
        self._every = every
        self._process_set = process_set
        self._joins = process_set.joins
        self._steps = 0

    def after_step(self, optimizer: Any) -> None:
        """To be called after each step; on all ranks but those that have joined."""
        if self._joins != self._process_set.joins:  # before that, ranks have made different numbers of steps
            self._joins = self._process_set.joins
            self._steps = 0
        self._steps += 1
        if self._steps % self._every == 0:
            # With Adasum each rank's moments come from its own gradients.
            check_optimizer(optimizer, optimizer._names, self._process_set, state=optimizer._adasum is None)


def _outside_graphs(function: Callable[..., Any]) -> Any:
    """Exclude it from graphs: a step function may be compiled, but waiting for other ranks has no place in a graph."""
    return torch.compiler.disable(function)  # type: ignore[no-untyped-call]


def _checked_names(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.Tensor]] | None
) -> dict[torch.Tensor, str]:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if named_parameters is None:
        for number, p in enumerate(held):
            _check_memory(f"parameter.{number}", p)
        return {p: f"parameter.{number}" for number, p in enumerate(held)}
    pairs = list(named_parameters)
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise InvalidArgumentError("named_parameters are pairs (name, parameter), as from model.named_parameters()")
    names = {p: name for name, p in pairs}
    for name, p in pairs:
        _check_memory(name, p)
    duplicates = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    if duplicates:
        raise InvalidArgumentError(
            f"named_parameters: these names stand for several parameters: {', '.join(duplicates)}"
        )
    unnamed = [number for number, p in enumerate(held) if p not in names]
    if unnamed:
        raise InvalidArgumentError(
            f"named_parameters: parameters number {', '.join(map(str, unnamed))} of the optimizer have no name"
        )
    return names


def _check_memory(name: str, p: torch.Tensor) -> None:
    """Refuse what cannot be read, such as a DTensor: it would train apart from the other ranks'."""
    if p.is_meta:
        return  # for now
    try:
        arrays.address_of_tensor(p)
    except UnsupportedTypeError as error:
        raise UnsupportedTypeError(f"rank {runtime.rank()}: DistributedOptimizer: '{name}': {error}") from None


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
