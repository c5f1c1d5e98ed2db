"""Wire formats of gradients, under Horovod's names."""

from __future__ import annotations

from typing import ClassVar, Literal

__all__ = ["Compression", "Compressor"]


class Compressor:
    """The type in which floating-point tensors travel. The engine casts inside its pack and unpack passes."""

    wire: ClassVar[Literal["fp16", "bf16"] | None] = None


class _FP16(Compressor):
    wire = "fp16"


class _BF16(Compressor):
    wire = "bf16"


class Compression:
    """What `compression=` takes."""

    none: type[Compressor] = Compressor
    """Tensors travel in their own type."""

    fp16: type[Compressor] = _FP16
    """float32 and float64 travel as float16 (11 bits of precision, at most 65504); an average divides first."""

    bf16: type[Compressor] = _BF16
    """float32 and float64 travel as bfloat16 (8 bits of precision, float32's range)."""
