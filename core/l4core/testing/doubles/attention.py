"""Paged attention in plain torch for the doubles' bodies, and the checks they share. float32 throughout; returns the log-sum-exp too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Mask", "check", "paged_attention"]

UNBOUNDED = -1


def check(holds: bool, rule: str) -> None:
    """RuntimeError like a library's own argument check."""
    if not holds:
        raise RuntimeError(rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """causal: bottom-right aligned.  left, right: keys of a sliding window on either side, −1 = unbounded.  chunk: positions, 0 = none."""

    causal: bool
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    chunk: int = 0

    def visible(self, num_rows: int, num_keys: int) -> torch.Tensor:
        """bool [num_rows, num_keys]"""
        position = torch.arange(num_keys - num_rows, num_keys)[:, None]
        key = torch.arange(num_keys)
        seen = torch.ones(num_rows, num_keys, dtype=torch.bool)
        if self.causal:
            seen &= key <= position
        if self.left != UNBOUNDED:
            seen &= key >= position - self.left
        if self.right != UNBOUNDED:
            seen &= key <= position + self.right
        if self.chunk:
            seen &= key // self.chunk == position // self.chunk
        return seen


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bounds: Sequence[int],
    lengths: Sequence[int],
    table: torch.Tensor,
    scale: float,
    mask: Mask,
    descale: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None),
    reads_tail: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, Hq, D]; k, v [pages, page, Hkv, D]; bounds [B+1], lengths [B] on the host; table [B, W]; descale of q, k, v: [B, Hkv] each.

    reads_tail: multiplies the values past a sequence's end in its last page by zero, as kernels do that mask scores only: NaN there spoils a row.
    → out float32 [T, Hq, D], lse float32 [Hq, T]. A row that sees no key: 0 and −inf. A row of no sequence: NaN in both.
    """
    num_tokens, num_q_heads, _ = q.shape
    page_size, num_kv_heads = k.shape[1], k.shape[2]
    out = torch.full((num_tokens, num_q_heads, v.shape[3]), torch.nan)
    lse = torch.full((num_q_heads, num_tokens), torch.nan)
    for b, length in enumerate(lengths):
        rows = slice(bounds[b], bounds[b + 1])
        if rows.stop == rows.start:
            continue
        check(
            length <= table.shape[1] * page_size,
            f"sequence {b}: {length} keys on {table.shape[1]} pages of {page_size}",
        )
        pages = table[b, : -(-length // page_size)].long()
        check(
            bool(((pages >= 0) & (pages < k.shape[0])).all()), f"sequence {b}: a page id outside 0 … {k.shape[0] - 1}"
        )
        scales = [None if s is None else s[b] for s in descale]
        rows_q = _scaled(q[rows], scales[0], num_q_heads // num_kv_heads)
        keys = _scaled(k[pages].flatten(0, 1)[:length], scales[1], 1)
        stored = v[pages].flatten(0, 1)
        values = _scaled(stored[:length], scales[2], 1)
        out[rows], lse[:, rows] = _dense(rows_q, keys, values, scale, mask)
        if reads_tail:
            out[rows] += (0 * stored[length:].float()).sum(0).repeat_interleave(num_q_heads // num_kv_heads, dim=0)
    return out, lse


def _scaled(x: torch.Tensor, scale: torch.Tensor | None, group: int) -> torch.Tensor:
    """x [n, heads, D], scale [Hkv] or None → float32"""
    return x.float() if scale is None else x.float() * scale.repeat_interleave(group)[:, None]


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: Mask
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [n, Hq, D], k and v [S, Hkv, D] → out [n, Hq, D], lse [Hq, n]"""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("nhd,khd->hnk", q, k.repeat_interleave(group, dim=1)) * scale
    scores = scores.masked_fill(~mask.visible(len(q), len(k)), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isneginf(), 0.0, lse)[..., None]).exp()
    return torch.einsum("hnk,khd->nhd", weights, v.repeat_interleave(group, dim=1)), lse
