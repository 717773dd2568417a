"""The only writer of keys and values."""

from __future__ import annotations

import torch


def kv_write(
    pages: torch.Tensor,
    kv: torch.Tensor,
    page_ids: torch.Tensor,
    offsets: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Stores kv [T, 2, Hkv, D] (k, v of T new tokens) at page_ids, offsets (int64 [T]) of pages [num_pages, 2, P, Hkv, D], a view of free page
    stride. Offsets are 64-bit; no two tokens may share a slot, except slots of the null page.

    fp8 pages hold x / scale, divided in float32, saturated at the format's largest value and rounded to nearest even; NaN stays NaN.
    k_scale, v_scale: float32 scalars that readers multiply with (KVView), both or none; None = 1, and for other dtypes. Scales are numbers of a
    layer and never of the data at hand: a stored token must not depend on the tokens it was computed beside. The Triton twin is ops.heads_triton.
    """
    if pages.dtype.itemsize > 1 or not pages.dtype.is_floating_point:
        pages[page_ids, :, offsets] = kv.to(pages.dtype)
        return
    values, largest = kv.float(), torch.finfo(pages.dtype).max
    if k_scale is not None and v_scale is not None:
        values = values / torch.stack((k_scale, v_scale)).view(2, 1, 1)
    stored = values.clamp(-largest, largest).to(pages.dtype)  # torch's own cast does not saturate on every device
    pages.view(torch.uint8)[page_ids, :, offsets] = stored.view(torch.uint8)
