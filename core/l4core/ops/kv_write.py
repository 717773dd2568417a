"""The only writer of keys and values."""

from __future__ import annotations

import torch


def kv_write(pages: torch.Tensor, kv: torch.Tensor, page_ids: torch.Tensor, offsets: torch.Tensor) -> None:
    """Stores kv [T, 2, Hkv, D] (k, v of T new tokens) at page_ids, offsets (int64 [T]) of pages [num_pages, 2, P, Hkv, D], a view of free page
    stride. Offsets are 64-bit; no two tokens may share a slot, except slots of the null page."""
    pages[page_ids, :, offsets] = kv.to(pages.dtype)
