"""Wire formats of gradients, under Horovod's names, and compressors of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch

__all__ = [
    "BF16Compressor",
    "Compression",
    "Compressor",
    "FP16Compressor",
    "NoneCompressor",
    "compressed",
    "compressed_group",
    "is_compressor",
    "is_custom",
    "wire_of",
]


class Compressor:
    """How tensors travel; a base class for compressors of your own.

    The built-in ones name a type in `wire`, and the engine casts inside its pack and unpack passes, without another
    copy. A subclass with a `compress` or `decompress` of its own is called in Python, once per tensor; what `compress`
    returns is what is reduced, so it has the same shape and dtype on all ranks.
    """

    wire: ClassVar[Literal["fp16", "bf16"] | None] = None

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The tensor that travels, and what `decompress` needs to know."""
        return tensor, None

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """The tensor that the caller gets, made from the one that has travelled."""
        return tensor if ctx is None else tensor.to(ctx)


class NoneCompressor(Compressor):
    """Tensors travel in their own type."""


class FP16Compressor(Compressor):
    """float32 and float64 travel as float16 (11 bits of precision, at most 65504); an average scales them first."""

    wire = "fp16"

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The tensor as float16, and its own type."""
        return _cast(tensor, torch.float16)


class BF16Compressor(Compressor):
    """float32 and float64 travel as bfloat16 (8 bits of precision, float32's range)."""

    wire = "bf16"

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The tensor as bfloat16, and its own type."""
        return _cast(tensor, torch.bfloat16)


class Compression:
    """What `compression=` takes."""

    none: type[Compressor] = NoneCompressor
    """Tensors travel in their own type."""

    fp16: type[Compressor] = FP16Compressor
    """See `FP16Compressor`."""

    bf16: type[Compressor] = BF16Compressor
    """See `BF16Compressor`."""


_BY_ENGINE = {
    method
    for ours in (Compressor, FP16Compressor, BF16Compressor)
    for method in (ours.compress, ours.decompress)  # functions, since they are static
}


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, Any]:
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor, None
    return tensor.to(dtype), tensor.dtype


def is_compressor(compression: Any) -> bool:
    """Whether it has the two methods; Horovod requires no more either."""
    return callable(getattr(compression, "compress", None)) and callable(getattr(compression, "decompress", None))


def is_custom(compression: Any) -> bool:
    """Whether its methods must be called, because the engine cannot do the same."""
    return is_compressor(compression) and not {compression.compress, compression.decompress} <= _BY_ENGINE


def wire_of(compression: Any) -> Any:
    """The type in which the engine is to send; anything but a compressor is returned as is, and refused by the call."""
    if not is_compressor(compression):
        return compression
    return None if is_custom(compression) else compression.wire


def _sent(compression: Any, tensor: torch.Tensor) -> tuple[Any, Any]:
    """What a compressor of the user's own makes of a tensor; if it raises, the error and no context."""
    try:
        small, context = compression.compress(tensor)
    except Exception as error:
        return error, None  # raised by the call, where the other ranks learn of it
    return small, context


def compressed(compression: Any, tensor: torch.Tensor, run: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """What `run` returns for the tensor, between the two methods of a compressor of the user's own."""
    if not is_custom(compression):
        return run(tensor)
    small, context = _sent(compression, tensor)
    result: torch.Tensor = compression.decompress(run(small), context)
    return result


def compressed_group(
    compression: Any, tensors: Sequence[torch.Tensor], run: Callable[[Sequence[Any]], list[torch.Tensor]]
) -> list[torch.Tensor]:
    """The same for several tensors."""
    if not is_custom(compression):
        return run(tensors)
    sent = [_sent(compression, tensor) for tensor in tensors]
    results = run([small for small, _ in sent])
    return [compression.decompress(result, context) for result, (_, context) in zip(results, sent, strict=True)]
