"""Tensors as the engine sees them: one by one, and lists that are one piece of memory or are made one."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from ... import arrays
from ...errors import UnsupportedTypeError

__all__ = ["Place", "Tensors", "as_one", "deal", "rows_text", "side_by_side", "store_from_host"]

Tensors = list[torch.Tensor]


class Place:
    """A tensor as the engine sees it: its view, and what has to be copied back."""

    __slots__ = ("copy", "tensor", "view")

    def __init__(self, tensor: torch.Tensor, where: str) -> None:
        self.tensor = tensor
        try:
            self.view = arrays.view(tensor, True)
        except UnsupportedTypeError as error:
            raise UnsupportedTypeError(f"{where}: {error}") from None
        self.copy = None
        if not self.view.contiguous:
            self.copy = tensor.contiguous().resolve_conj().resolve_neg()
            self.view = arrays.view(self.copy, True)

    @property
    def array(self) -> torch.Tensor:
        """What the engine reads and writes."""
        return self.tensor if self.copy is None else self.copy

    def store(self) -> None:
        """Copy the result to where the caller wants it."""
        if self.copy is not None:
            self.tensor.copy_(self.copy)


def rows_text(rows: Sequence[int]) -> str:
    """What ranks compare of the elements of each rank."""
    if len(set(rows)) <= 1:
        return f"{rows[0]} elements of each rank" if rows else ""
    text = f"elements by rank {', '.join(map(str, rows))}"
    return text if len(text) < 1000 else f"elements by rank, with checksum {zlib.crc32(text.encode())}"


def as_one(parts: Tensors) -> torch.Tensor | None:
    """The memory of tensors that follow each other without a gap, as one; None where they do not."""
    at = parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != at or not part.is_contiguous() or part.is_conj() or part.is_neg():
            return None
        at += part.numel() * part.itemsize
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if any(part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for part in parts):
        return None
    return first.as_strided((sum(part.numel() for part in parts),), (1,))


def side_by_side(parts: Tensors) -> torch.Tensor:
    """The elements of all, side by side; a copy unless they are so already."""
    whole = as_one(parts)
    return whole if whole is not None else torch.cat([part.reshape(-1) for part in parts])


def deal(flat: torch.Tensor, parts: Tensors) -> None:
    """Give each tensor its elements."""
    at = 0
    for part in parts:
        part.copy_(flat[at : at + part.numel()].view(part.shape))
        at += part.numel()


def store_from_host(ticket: Any, parts: Tensors, like: torch.Tensor) -> None:
    """Give tensors on a device what the engine has gathered on the host."""
    nbytes = sum(part.numel() * part.itemsize for part in parts)
    deal(torch.from_numpy(ticket.take_output(nbytes)).view(like.dtype), parts)
