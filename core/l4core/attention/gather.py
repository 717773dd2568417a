"""Copies the keys and values of chosen tokens out of their pages into scratch memory (a CPU's attention reads them side by side)."""

from __future__ import annotations

import torch

from l4core.plugin_api import KVView


class Scratch:
    """Two buffers, for keys and for values, that grow and are used again: fresh memory in every layer would cost more than the copy."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor | None] = [None, None]

    def take(self, which: int, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor of that shape; it shares memory with all others taken for the same `which`."""
        needed = shape[0] * shape[1] * shape[2]
        buffer = self._buffers[which]
        if buffer is None or buffer.numel() < needed or buffer.dtype != dtype:
            buffer = self._buffers[which] = torch.empty(needed, dtype=dtype)
        return buffer[:needed].view(shape)


class Gather:
    """The tokens at (pages[i], offsets[i]), int64 [n]. Made once a step; what depends on the KV's strides is worked out in the first layer."""

    def __init__(self, pages: torch.Tensor, offsets: torch.Tensor, scratch: Scratch) -> None:
        self._pages, self._offsets, self._scratch = pages, offsets, scratch
        self._stride: tuple[int, ...] = ()
        self._rows = pages
        self._out: list[torch.Tensor] = []

    def __call__(self, kv: KVView, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v, each [n, num_kv_heads, head_dim] in `dtype`, valid until the scratch is used again."""
        if kv.k.stride(0) % kv.k.stride(1) or kv.v.stride() != kv.k.stride():
            k, v = kv.k[self._pages, self._offsets], kv.v[self._pages, self._offsets]
        else:
            if kv.k.stride() != self._stride or kv.k.dtype != self._out[0].dtype:
                self._prepare(kv)
            k, v = (
                torch.index_select(_tokens(x), 0, self._rows, out=y)
                for x, y in ((kv.k, self._out[0]), (kv.v, self._out[1]))
            )
        return _scaled(k, kv.k_scale, dtype), _scaled(v, kv.v_scale, dtype)

    def _prepare(self, kv: KVView) -> None:
        """The KV seen as one list of token rows, a page stride apart for each page: which rows, and where they go."""
        self._stride = kv.k.stride()
        self._rows = self._pages * (self._stride[0] // self._stride[1]) + self._offsets
        shape = (self._rows.shape[0], kv.k.shape[2], kv.k.shape[3])
        self._out = [self._scratch.take(which, shape, kv.k.dtype) for which in (0, 1)]


def _tokens(paged: torch.Tensor) -> torch.Tensor:
    """[num_pages, P, Hkv, D] of any page stride that is a multiple of a token's → [rows, Hkv, D]; row = page · (strides' ratio) + offset."""
    num_pages, page_size, num_kv_heads, head_dim = paged.shape
    page, token, head, element = paged.stride()
    return paged.as_strided(
        ((num_pages - 1) * (page // token) + page_size, num_kv_heads, head_dim), (token, head, element)
    )


def _scaled(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    x = x.to(dtype)
    return x if scale is None else x * scale.to(dtype)
