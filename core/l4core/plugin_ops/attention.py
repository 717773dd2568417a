"""Helpers for attention backends: read pages, and merge partial results over disjoint sets of keys."""

from __future__ import annotations

import torch

from l4core.plugin_api import KVView

__all__ = ["gather_kv", "merge_lse"]


def gather_kv(kv: KVView, pages: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of whole pages, in the order given, back to back; stored fp8 values are multiplied by their scale.

    pages: integer [n].  Returns k, v [n * page_size, num_kv_heads, head_dim] in `dtype`. Slots that no sequence owns hold anything, NaN included:
    cut the tail of the last page off, for 0 · NaN is NaN.
    """
    k, v = kv.k[pages].flatten(0, 1).to(dtype), kv.v[pages].flatten(0, 1).to(dtype)
    if kv.k_scale is not None:
        k = k * kv.k_scale
    if kv.v_scale is not None:
        v = v * kv.v_scale
    return k, v


def merge_lse(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from attention over each.

    out_*: [..., head_dim], normalised.  lse_*: [...], natural log of the sum of exp(score); −inf = no keys, and then that side's `out` is ignored,
    whatever it holds.  Returns (out, lse); with no keys on either side out is 0 and lse is −inf. For base-2 LSE multiply by ln 2 first.
    """
    top = torch.maximum(lse_a, lse_b)
    base = torch.where(top.isneginf(), 0.0, top)
    weight_a, weight_b = (lse_a - base).exp(), (lse_b - base).exp()
    total = weight_a + weight_b
    share = torch.where(total > 0, total, 1.0)
    kept_a = torch.where(lse_a.isneginf().unsqueeze(-1), 0.0, out_a)
    kept_b = torch.where(lse_b.isneginf().unsqueeze(-1), 0.0, out_b)
    out = kept_a * (weight_a / share).unsqueeze(-1) + kept_b * (weight_b / share).unsqueeze(-1)
    return out, base + total.log()
