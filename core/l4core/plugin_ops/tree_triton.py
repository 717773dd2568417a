"""The node pass of tree verification as one Triton kernel: see `tree`. Imported only where it runs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from l4core.plugin_api import AttentionMetadata, KVView

BLOCK_ROWS = 32


@triton.jit
def _node_kernel(
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q,
    seq_lens,
    block_table,
    ancestors,
    k_scale,
    v_scale,
    scale,
    stride_table,
    stride_q_token,
    stride_q_head,
    stride_k_page,
    stride_k_slot,
    stride_k_head,
    stride_v_page,
    stride_v_slot,
    stride_v_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (num_seqs, KV_HEADS, blocks of packed rows): row r of a sequence is node r // GROUP, head r % GROUP. All its nodes fit one tile of keys.
    Computed in float32: there are few nodes, and their page reads are what takes time."""
    b, head = tl.program_id(0), tl.program_id(1)
    token_0 = tl.load(cu_seqlens_q + b)
    q_len = tl.load(cu_seqlens_q + b + 1) - token_0
    seq_len = tl.load(seq_lens + b)
    first_row = tl.program_id(2) * BLOCK_M
    if (first_row >= q_len * GROUP) | (seq_len == 0):
        return
    row = first_row + tl.arange(0, BLOCK_M)
    node, dim = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    row_exists, node_exists = row < q_len * GROUP, node < q_len
    token, q_head = (token_0 + row // GROUP).to(tl.int64), head * GROUP + row % GROUP
    q_at = q + token * stride_q_token + q_head * stride_q_head
    rows = tl.load(q_at[:, None] + dim[None, :], mask=row_exists[:, None], other=0.0).to(tl.float32)

    position = tl.where(node_exists, seq_len - q_len + node, 0)
    table_row = block_table + b.to(tl.int64) * stride_table
    page = tl.load(table_row + position // PAGE, mask=node_exists, other=0).to(tl.int64)
    slot = position % PAGE
    k_at = k + page * stride_k_page + slot * stride_k_slot + head * stride_k_head
    v_at = v + page * stride_v_page + slot * stride_v_slot + head * stride_v_head
    keys = tl.load(k_at[:, None] + dim[None, :], mask=node_exists[:, None], other=0.0).to(tl.float32)
    values = tl.load(v_at[:, None] + dim[None, :], mask=node_exists[:, None], other=0.0).to(tl.float32)

    if k_scale is not None:
        scale = scale * tl.load(k_scale)
    scores = tl.dot(rows, tl.trans(keys), input_precision="ieee") * scale
    bitmap = tl.load(ancestors + token, mask=row_exists, other=0)
    seen = (((bitmap[:, None] >> node[None, :].to(tl.int64)) & 1) != 0) & node_exists[None, :]
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.max(scores, 1)
    base = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(scores - base[:, None])
    total = tl.sum(weights, 1)
    some = tl.where(total > 0, total, 1.0)  # a row that sees no node keeps top = −inf
    acc = tl.dot(weights, values, input_precision="ieee") / some[:, None]
    if v_scale is not None:
        acc = acc * tl.load(v_scale)
    at = token * (KV_HEADS * GROUP) + q_head
    tl.store(out + at[:, None] * HEAD_DIM + dim[None, :], acc, mask=row_exists[:, None])
    tl.store(lse + at, top + tl.log(some), mask=row_exists)


def tree_attend_triton(
    q: torch.Tensor, kv: KVView, meta: AttentionMetadata, ancestors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As tree_attend. head_dim: a power of two from 16 on, checked by the caller."""
    num_tokens, num_q_heads, head_dim = q.shape
    page_size, kv_heads = kv.k.shape[1:3]
    group = num_q_heads // kv_heads
    out = torch.zeros(num_tokens, num_q_heads, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.full((num_tokens, num_q_heads), -torch.inf, dtype=torch.float32, device=q.device)
    _node_kernel[(meta.num_seqs, kv_heads, triton.cdiv(meta.max_seqlen_q * group, BLOCK_ROWS))](
        q,
        kv.k,
        kv.v,
        out,
        lse,
        meta.cu_seqlens_q,
        meta.seq_lens,
        meta.block_table,
        ancestors,
        kv.k_scale,
        kv.v_scale,
        head_dim**-0.5,
        meta.block_table.stride(0),
        q.stride(0),
        q.stride(1),
        *kv.k.stride()[:3],
        *kv.v.stride()[:3],
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE=page_size,
        BLOCK_M=BLOCK_ROWS,
        BLOCK_N=max(16, triton.next_power_of_2(meta.max_seqlen_q)),
        num_warps=4,
        enable_fp_fusion=True,  # said aloud: Triton's default for it changes in 3.10
    )
    return out, lse
