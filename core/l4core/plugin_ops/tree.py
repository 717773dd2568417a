"""The node pass of tree verification, for backends whose own kernel takes no tree mask.

Such a backend attends twice and merges: all rows over the prefix without a causal mask, and here each row over the nodes it descends from.

    out_n, lse_n = tree_attend(q, kv, meta)
    lse_p = lse_p.masked_fill(~meta.tree.sees_prefix[:, None], -torch.inf)      # where sees_prefix is given; lse_p natural, [T, Hq]
    out, _ = merge_lse(out_p, lse_p, out_n, lse_n)
"""

from __future__ import annotations

import importlib.util

import torch

from l4core.plugin_api import AttentionMetadata, KVView

__all__ = ["MAX_NODES", "tree_attend"]

MAX_NODES = 64
"""Nodes of one sequence: bits of an int64."""


def tree_attend(q: torch.Tensor, kv: KVView, meta: AttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each row to those nodes of its own sequence whose bit is set in `meta.tree.ancestors`; the prefix is not read.

    q: [T, num_q_heads, head_dim], float, may be a strided slice.  kv: the layer's pages, fp8 with scales as well.  meta: of the verify step, with
    its tree; `seq_lens` count prefix and nodes, so node j of sequence b is key seq_lens[b] − q_len[b] + j.
    Returns out [T, num_q_heads, head_dim] and lse [T, num_q_heads], both float32 (float64 for float64 q), lse the natural logarithm.
    Rows that see no node, or belong to no sequence (past cu_seqlens_q[-1], or of seq_len 0), get out 0 and lse −inf.
    Device work of static shape, no host sync. Raises ValueError without a tree or with max_seqlen_q above MAX_NODES.
    """
    if meta.tree is None:
        raise ValueError("tree_attend is for a verify step that carries a TreeMask; meta.tree is None")
    if meta.max_seqlen_q > MAX_NODES:
        raise ValueError(f"max_seqlen_q is {meta.max_seqlen_q}; a tree has at most {MAX_NODES} nodes a sequence")
    if _kernel_takes(q):
        from l4core.plugin_ops.tree_triton import tree_attend_triton

        return tree_attend_triton(q, kv, meta, meta.tree.ancestors)
    return tree_attend_torch(q, kv, meta, meta.tree.ancestors)


def _kernel_takes(q: torch.Tensor) -> bool:
    head_dim = q.shape[2]
    fits = q.dtype != torch.float64 and head_dim >= 16 and head_dim & (head_dim - 1) == 0
    return fits and q.device.type in ("cuda", "xpu") and importlib.util.find_spec("triton") is not None


def tree_attend_torch(
    q: torch.Tensor, kv: KVView, meta: AttentionMetadata, ancestors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, on any device: the definition the kernel is held to."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = kv.k.shape[2]
    owner, owned = _owners(meta, num_tokens)
    k, v = _nodes(kv, meta, wide)  # [B, M, Hkv, D]
    grouped = q.to(wide).reshape(num_tokens, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    scores = torch.einsum("thgd,tmhd->thgm", grouped, k[owner]) * head_dim**-0.5
    node = torch.arange(meta.max_seqlen_q, device=q.device)
    q_lens = meta.cu_seqlens_q.diff()
    seen = (ancestors[:, None] >> node & 1).bool() & (node < q_lens[owner][:, None])  # [T, M]
    seen &= owned[:, None] & (meta.seq_lens > 0)[owner][:, None]
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)  # [T, Hkv, G]
    weights = (scores - torch.where(lse.isneginf(), 0.0, lse).unsqueeze(-1)).exp()
    out = torch.einsum("thgm,tmhd->thgd", weights, v[owner])
    return out.reshape(q.shape), lse.reshape(num_tokens, num_q_heads)


def _owners(meta: AttentionMetadata, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [T] sequence of each row, bool [T] whether it has one."""
    row = torch.arange(num_tokens, device=meta.cu_seqlens_q.device, dtype=meta.cu_seqlens_q.dtype)
    owner = torch.searchsorted(meta.cu_seqlens_q, row, right=True) - 1
    return owner.clamp(max=meta.num_seqs - 1), row < meta.cu_seqlens_q[-1]


def _nodes(kv: KVView, meta: AttentionMetadata, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v [B, max_seqlen_q, Hkv, D] of the nodes, zero past a sequence's last: what lies there is nobody's and may be NaN."""
    page_size = kv.k.shape[1]
    node = torch.arange(meta.max_seqlen_q, device=meta.seq_lens.device)
    q_lens = meta.cu_seqlens_q.diff()[:, None]
    position = (meta.seq_lens[:, None] - q_lens + node).long()  # [B, M]
    exists = (node < q_lens) & (position >= 0)
    position = torch.where(exists, position, 0)
    page, slot = meta.block_table.gather(1, position // page_size).long(), position % page_size
    k, v = (torch.where(exists[..., None, None], x[page, slot].to(dtype), 0.0) for x in (kv.k, kv.v))
    if kv.k_scale is not None:
        k = k * kv.k_scale
    if kv.v_scale is not None:
        v = v * kv.v_scale
    return k, v
