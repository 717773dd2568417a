"""The sdpa backend without host lengths: every sequence padded to the batch's bounds, masks instead of slices, nothing read back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from l4core.plugin_api import AttentionMetadata, KVView

MAX_SCORES = 1 << 26
"""Mask elements of one call (query rows × keys, per sequence); more sequences than fit are taken in turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """Device tensors with shapes from host bounds. query_rows: int64 [B, Q], row of q (clamped where a sequence has fewer).  pages: int64
    [B, W].  owned: bool [B, S], slots that hold one of the sequence's tokens.  visible: bool [B, Q, S].  page_size S = W · page_size."""

    cu_seqlens_q: torch.Tensor
    query_index: torch.Tensor
    pages: torch.Tensor
    owned: torch.Tensor
    seq_lens: torch.Tensor
    num_seqs: int
    max_seqlen_q: int


def plan_padded(meta: AttentionMetadata, page_size: int) -> DevicePlan:
    """No host sync: all shapes come from meta.max_seqlen_q, max_seqlen_k and num_seqs."""
    width = min(-(-max(meta.max_seqlen_k, 1) // page_size), meta.block_table.shape[1])
    device = meta.seq_lens.device
    owned = torch.arange(width * page_size, device=device) < meta.seq_lens.unsqueeze(1)
    return DevicePlan(
        cu_seqlens_q=meta.cu_seqlens_q.long(),
        query_index=torch.arange(meta.max_seqlen_q, device=device),
        pages=meta.block_table[:, :width].long(),
        owned=owned,
        seq_lens=meta.seq_lens.long(),
        num_seqs=meta.num_seqs,
        max_seqlen_q=meta.max_seqlen_q,
    )


def attend_padded(q: torch.Tensor, kv: KVView, plan: DevicePlan, out: torch.Tensor) -> None:
    """q, out [T, Hq, D]. Rows that no sequence owns keep what they held."""
    num_keys = plan.owned.shape[1]
    turn = max(1, MAX_SCORES // max(1, plan.max_seqlen_q * num_keys))
    padded = torch.cat(
        [_attend_some(q, kv, plan, slice(b, b + turn)) for b in range(0, plan.num_seqs, turn)]
    )  # [B, Q, Hq, D]
    token = torch.arange(q.shape[0], device=q.device)
    sequence = torch.searchsorted(plan.cu_seqlens_q[1:].contiguous(), token, right=True)
    has_owner = (sequence < plan.num_seqs)[:, None, None]
    sequence = sequence.clamp(max=plan.num_seqs - 1)
    index = (token - plan.cu_seqlens_q[sequence]).clamp(max=plan.max_seqlen_q - 1)
    out.copy_(torch.where(has_owner, padded[sequence, index], out))


def _attend_some(q: torch.Tensor, kv: KVView, plan: DevicePlan, some: slice) -> torch.Tensor:
    """→ [b, Q, Hq, D] of the sequences in `some`."""
    k, v = (_read(x, scale, plan, some, q.dtype) for x, scale in ((kv.k, kv.k_scale), (kv.v, kv.v_scale)))
    begin, past = plan.cu_seqlens_q[:-1][some], plan.cu_seqlens_q[1:][some]
    rows = (begin.unsqueeze(1) + plan.query_index).clamp(max=q.shape[0] - 1)  # [b, Q]
    queries = q[rows]  # [b, Q, Hq, D]
    batch, num_queries, num_q_heads, head_dim = queries.shape
    group = num_q_heads // k.shape[1]
    last_visible = (plan.seq_lens[some] - (past - begin)).unsqueeze(1) + plan.query_index  # [b, Q]
    keys = torch.arange(k.shape[2], device=q.device)
    visible = (keys <= last_visible.unsqueeze(2)) & plan.owned[some].unsqueeze(1)  # [b, Q, S]
    result = F.scaled_dot_product_attention(
        queries.permute(0, 2, 1, 3).reshape(batch, k.shape[1], group * num_queries, head_dim),
        k,
        v,
        attn_mask=visible[:, None].expand(-1, group, -1, -1).reshape(batch, 1, group * num_queries, -1),
    )  # [b, Hkv, G · Q, D]
    return result.reshape(batch, num_q_heads, num_queries, head_dim).transpose(1, 2)


def _read(
    paged: torch.Tensor, scale: torch.Tensor | None, plan: DevicePlan, some: slice, dtype: torch.dtype
) -> torch.Tensor:
    """→ [b, Hkv, S, D]. What no sequence owns is replaced, not multiplied, by zero: it may be NaN."""
    as_bytes = paged.view(torch.uint8) if paged.dtype.itemsize == 1 else paged  # not every device indexes fp8
    tokens = as_bytes[plan.pages[some]].view(paged.dtype).flatten(1, 2).to(dtype)  # [b, S, Hkv, D]
    tokens = torch.where(plan.owned[some][:, :, None, None], tokens, torch.zeros((), dtype=dtype, device=tokens.device))
    return (tokens if scale is None else tokens * scale.to(dtype)).transpose(1, 2)
