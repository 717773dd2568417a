"""Small helpers for work on many rows: blocks that bound memory, and one transfer of many small results to the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy.typing as npt
import torch

from l4core.plugin_ops.upload import Download

__all__ = ["Outbox", "blocks", "rows_per_block"]

HostArray: TypeAlias = npt.NDArray[Any]

_ELEMENTS_ON_HOST = 2**20
"""4 MB of float32: a block and what is made of it stay in a CPU's caches."""
_ELEMENTS_ON_DEVICE = 2**24
"""64 MB of float32; the noise of a block needs about ten times that while it is made."""


def rows_per_block(logits: torch.Tensor) -> int:
    """How many rows of `logits` [R, V] to work on at a time."""
    elements = _ELEMENTS_ON_HOST if logits.device.type == "cpu" else _ELEMENTS_ON_DEVICE
    return max(1, elements // logits.shape[1])


def blocks(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """`rows` in pieces of `size`, the last may be shorter."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


class Outbox:
    """Collects device tensors and brings them to the host in one copy, as 32-bit words whatever their type."""

    def __init__(self) -> None:
        self._words: list[torch.Tensor] = []
        self._shapes: list[tuple[torch.Size, bool]] = []
        self._sent: Download | None = None

    def add(self, tensor: torch.Tensor) -> None:
        """tensor: float32, or integers that fit 32 bits, of any shape."""
        is_float = tensor.is_floating_point()
        words = tensor.contiguous().view(torch.int32) if is_float else tensor.to(torch.int32)
        self._words.append(words.reshape(-1))
        self._shapes.append((tensor.shape, is_float))

    def send(self) -> None:
        """Ask for the copy now, once everything was added; `fetch` waits for it. The tensors may change afterwards."""
        self._sent = Download(torch.cat(self._words)) if self._words else None

    def fetch(self) -> list[HostArray]:
        """All tensors in the order they were added, float32 or int32, on the host."""
        if not self._words:
            return []
        if self._sent is None:
            self.send()
        assert self._sent is not None
        words = self._sent.wait()
        pieces = torch.split(words, [shape.numel() for shape, _ in self._shapes])
        return [
            (piece.view(torch.float32) if is_float else piece).reshape(shape).numpy()
            for piece, (shape, is_float) in zip(pieces, self._shapes, strict=True)
        ]
