"""Attention of few query rows to many keys: a fixed number of programs share all tiles of all sequences evenly, then partial results are merged.

The tiles of a step form one line: sequence after sequence, in each one (KV head, block of rows) after the other, in each of these its tiles of
keys. Program i of n takes tiles i · total // n … (i+1) · total // n of it, wherever sequences end, so that it does not matter how long each is, and
the grid never changes: a captured graph stays as good as it was. Lengths are read on the device; there is no metadata to prepare.

Where there are many sequences, each item counts START tiles more than it has, which is about what beginning one costs: else programs with twenty
short sequences would end long after those that share a long one.

An "item" is one (sequence, KV head, block of rows). A program that has all of one writes the result; the others leave a partial one in slot
2 · program + 1 (it begins the item) or 2 · program (it goes on with it).
"""

from __future__ import annotations

import triton
import triton.language as tl

from l4_triton.kernels.common import as_query, attend_tiles
from l4_triton.kernels.early import let_next_start, wait_for_last


@triton.jit
def tile_line(
    cu_seqlens_q,
    seq_lens,
    num_seqs,
    items,
    programs,
    CHUNK: tl.constexpr,
    SEQS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    START: tl.constexpr,
):
    """→ length [SEQS] on the line of one item of each sequence, START and its tiles, or 0; ends int64 [SEQS] of each sequence on the line; their
    total; programs at work."""
    ids = tl.arange(0, SEQS)
    there = ids < num_seqs
    seq_len = tl.load(seq_lens + ids, mask=there, other=0)
    token_0 = tl.load(cu_seqlens_q + ids, mask=there, other=0)
    q_len = tl.load(cu_seqlens_q + ids + 1, mask=there, other=0) - token_0
    num_keys = seq_len
    if CHUNK > 0:
        num_keys = seq_len - tl.maximum(seq_len - q_len, 0) // CHUNK * CHUNK
    lengths = tl.where((q_len > 0) & (seq_len > 0), START + (num_keys + BLOCK_N - 1) // BLOCK_N, 0)
    ends = tl.cumsum(lengths.to(tl.int64), 0) * items
    total = tl.sum(lengths.to(tl.int64), 0) * items
    busy = tl.minimum(tl.maximum(total // MIN_TILES, 1), programs)
    return lengths, ends, total, busy


@triton.jit(do_not_specialize=["num_seqs", "width", "kv_heads", "items", "stride_table"])
def decode_kernel(  # noqa: C901, PLR0915  one kernel, top to bottom
    q,
    k,
    v,
    out,
    lse,
    part_out,
    part_lse,
    cu_seqlens_q,
    seq_lens,
    block_table,
    ancestors,
    sees_prefix,
    k_scale,
    v_scale,
    scale_log2,
    num_seqs,
    kv_heads,
    items,
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
    MIN_TILES: tl.constexpr,
    START: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (programs,). items: of one sequence, KV heads × blocks of rows.  part_out: float32 [2 · programs, BLOCK_M, HEAD_DIM].  part_lse: float32
    [2 · programs, BLOCK_M], base 2. Both are written only where an item is shared."""
    if PDL:
        let_next_start()
    program = tl.program_id(0)
    lengths, ends, line, busy = tile_line(
        cu_seqlens_q, seq_lens, num_seqs, items, tl.num_programs(0), CHUNK, SEQS, BLOCK_N, MIN_TILES, START
    )
    if PDL:
        wait_for_last()
    if program >= busy:
        return
    ids = tl.arange(0, SEQS)
    dim = tl.arange(0, HEAD_DIM)
    at = program * line // busy
    stop = (program + 1) * line // busy
    score_scale = scale_log2
    if k_scale is not None:
        score_scale = score_scale * tl.load(k_scale)

    while at < stop:
        b = tl.sum((ends <= at).to(tl.int32))
        length = tl.sum(tl.where(ids == b, lengths, 0))
        in_seq = (at - (tl.sum(tl.where(ids == b, ends, 0)) - length.to(tl.int64) * items)).to(tl.int32)
        item, in_item = in_seq // length, in_seq % length
        end_in_item = tl.minimum(length.to(tl.int64), in_item + stop - at).to(tl.int32)
        at += end_in_item - in_item
        item_tiles, tile, tile_end = length - START, tl.maximum(in_item - START, 0), end_in_item - START
        if tile_end > tile:  # else only what counts for the start of an item that begins with the next program
            head, first_row = item % kv_heads, item // kv_heads * BLOCK_M

            token_0 = tl.load(cu_seqlens_q + b)
            q_len = tl.load(cu_seqlens_q + b + 1) - token_0
            seq_len = tl.load(seq_lens + b)
            row = first_row + tl.arange(0, BLOCK_M)
            exists = row < q_len * GROUP
            token, q_head = (token_0 + row // GROUP).to(tl.int64), head * GROUP + row % GROUP
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

            first_key = 0
            if CHUNK > 0:
                first_key = tl.maximum(prefix, 0) // CHUNK * CHUNK
            begin = first_key + tile * BLOCK_N
            end = tl.minimum(first_key + tile_end * BLOCK_N, seq_len)
            acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc, top, total = attend_tiles(
                acc, top, total, rows, position, prefix, nodes, sees, k + head * stride_k_head, v + head * stride_v_head,
                block_table + b.to(tl.int64) * stride_table, begin, end, seq_len, width, stride_k_page, stride_k_slot,
                stride_v_page, stride_v_slot, score_scale, True, PAGE, CHUNK, TREE, PAIRS, CONVERTS, BLOCK_N, HEAD_DIM,
            )  # fmt: skip

            total = tl.where(total > 0, total, 1.0)  # a row that sees nothing keeps top = −inf
            acc = acc / total[:, None]
            if v_scale is not None:
                acc = acc * tl.load(v_scale)
            top += tl.log2(total)
            if tile_end - tile == item_tiles:
                out_at = out + token * stride_out_token + q_head * stride_out_head
                tl.store(out_at[:, None] + dim[None, :], acc.to(out.dtype.element_ty), mask=exists[:, None])
                if lse is not None:
                    tl.store(lse + token * (kv_heads * GROUP) + q_head, top * 0.6931471805599453, mask=exists)
            else:
                slot = ((2 * program + (tile == 0).to(tl.int32)) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
                tl.store(part_out + slot[:, None] * HEAD_DIM + dim[None, :], acc, mask=exists[:, None])
                tl.store(part_lse + slot, top, mask=exists)
