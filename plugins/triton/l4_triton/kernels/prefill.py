"""Attention of many query tokens a sequence: one program for BLOCK_M packed rows of one KV head, all their keys in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from l4_triton.kernels.common import as_query, attend_tiles


@triton.jit(do_not_specialize=["num_seqs", "width", "stride_table"])
def prefill_kernel(  # noqa: PLR0915  one kernel, top to bottom
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q,
    seq_lens,
    block_table,
    ancestors,
    sees_prefix,
    k_scale,
    v_scale,
    scale_log2,
    num_seqs,
    width,
    stride_table,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_k_page,
    stride_k_slot,
    stride_k_head,
    stride_v_page,
    stride_v_slot,
    stride_v_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    TREE: tl.constexpr,
    PAIRS: tl.constexpr,
    CONVERTS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    SEQS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (num_kv_heads, num_tokens · GROUP // BLOCK_M + num_seqs): sequence b has the row blocks from cu[b] · GROUP // BLOCK_M + b on, at least as
    many as it needs. The last come first: in causal attention they are the long ones. SEQS: a power of two, at least num_seqs."""
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    ids = tl.arange(0, SEQS)
    firsts = tl.load(cu_seqlens_q + ids, mask=ids < num_seqs, other=0)
    b = tl.sum(((firsts * GROUP // BLOCK_M + ids <= block) & (ids < num_seqs)).to(tl.int32)) - 1
    token_0 = tl.load(cu_seqlens_q + b)
    q_len = tl.load(cu_seqlens_q + b + 1) - token_0
    seq_len = tl.load(seq_lens + b)
    first_row = (block - token_0 * GROUP // BLOCK_M - b) * BLOCK_M
    if (first_row >= q_len * GROUP) | (seq_len == 0):
        return

    row = first_row + tl.arange(0, BLOCK_M)
    exists = row < q_len * GROUP
    token, q_head = (token_0 + row // GROUP).to(tl.int64), head * GROUP + row % GROUP
    dim = tl.arange(0, HEAD_DIM)
    q_at = q + token * stride_q_token + q_head * stride_q_head
    rows = as_query(tl.load(q_at[:, None] + dim[None, :], mask=exists[:, None], other=0.0), DOT_TYPE)
    prefix = seq_len - q_len
    position = prefix + row // GROUP
    nodes = tl.zeros([BLOCK_M], tl.int64)
    sees = exists
    if TREE:
        nodes = tl.load(ancestors + token, mask=exists, other=0)
        if sees_prefix is not None:
            sees = tl.load(sees_prefix + token, mask=exists, other=0) != 0

    # keys begin … full − 1 are seen by every row, those up to `end` by some
    first = prefix + first_row // GROUP
    last = prefix + (tl.minimum(first_row + BLOCK_M, q_len * GROUP) - 1) // GROUP
    begin = 0
    end = last + 1
    full = (first + 1) // BLOCK_N * BLOCK_N
    if CHUNK > 0:
        begin = first // CHUNK * CHUNK
        same_chunk = last - begin < CHUNK
        full = tl.where(same_chunk, begin + (first + 1 - begin) // BLOCK_N * BLOCK_N, begin)
    if TREE:
        end = seq_len
        full = 0

    k += head * stride_k_head
    v += head * stride_v_head
    table_row = block_table + b.to(tl.int64) * stride_table
    score_scale = scale_log2
    if k_scale is not None:
        score_scale = score_scale * tl.load(k_scale)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, top, total = attend_tiles(
        acc, top, total, rows, position, prefix, nodes, sees, k, v, table_row, begin, full, seq_len, width, stride_k_page,
        stride_k_slot, stride_v_page, stride_v_slot, score_scale, False, PAGE, CHUNK, TREE, PAIRS, CONVERTS, BLOCK_N, HEAD_DIM,
    )  # fmt: skip
    acc, top, total = attend_tiles(
        acc, top, total, rows, position, prefix, nodes, sees, k, v, table_row, full, end, seq_len, width, stride_k_page,
        stride_k_slot, stride_v_page, stride_v_slot, score_scale, True, PAGE, CHUNK, TREE, PAIRS, CONVERTS, BLOCK_N, HEAD_DIM,
    )  # fmt: skip

    total = tl.where(total > 0, total, 1.0)  # a row that sees nothing keeps top = −inf
    acc = acc / total[:, None]
    if v_scale is not None:
        acc = acc * tl.load(v_scale)
    out_at = out + token * stride_out_token + q_head * stride_out_head
    tl.store(out_at[:, None] + dim[None, :], acc.to(out.dtype.element_ty), mask=exists[:, None])
    if lse is not None:
        heads = tl.num_programs(0) * GROUP
        tl.store(lse + token * heads + q_head, (top + tl.log2(total)) * 0.6931471805599453, mask=exists)
