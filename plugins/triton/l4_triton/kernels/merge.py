"""The second pass of decode: where several programs shared an item, their partial results become one."""

from __future__ import annotations

import triton
import triton.language as tl

from l4_triton.kernels.decode import tile_line
from l4_triton.kernels.early import let_next_start, wait_for_last


@triton.jit(do_not_specialize=["num_seqs", "kv_heads", "programs"])
def merge_kernel(
    out,
    lse,
    part_out,
    part_lse,
    cu_seqlens_q,
    seq_lens,
    num_seqs,
    kv_heads,
    programs,
    stride_out_token,
    stride_out_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    SEQS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    DIMS: tl.constexpr,
    START: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (num_seqs, items of a sequence, rows of a block that may exist × HEAD_DIM // DIMS). The line of tiles, and who took what of it, are
    computed as in decode."""
    if PDL:
        let_next_start()
    b, item, row = tl.program_id(0), tl.program_id(1), tl.program_id(2) // (HEAD_DIM // DIMS)
    items = tl.num_programs(1)
    lengths, ends, line, busy = tile_line(
        cu_seqlens_q, seq_lens, num_seqs, items, programs, CHUNK, SEQS, BLOCK_N, MIN_TILES, START
    )
    ids = tl.arange(0, SEQS)
    length = tl.sum(tl.where(ids == b, lengths, 0)).to(tl.int64)
    begin = tl.sum(tl.where(ids == b, ends, 0)) - length * (items - item)
    first = ((begin + START + 1) * busy - 1) // tl.maximum(line, 1)
    last = ((begin + length) * busy - 1) // tl.maximum(line, 1)
    if PDL:
        wait_for_last()
    token_0 = tl.load(cu_seqlens_q + b)
    seq_row = item // kv_heads * BLOCK_M + row
    if (length == 0) | (first == last) | (seq_row >= (tl.load(cu_seqlens_q + b + 1) - token_0) * GROUP):
        return

    dim = tl.program_id(2) % (HEAD_DIM // DIMS) * DIMS + tl.arange(0, DIMS)
    acc = tl.zeros([DIMS], tl.float32)
    top = float("-inf")
    total = 0.0
    for part in range(first.to(tl.int32), last.to(tl.int32) + 1, BLOCK_PARTS):
        program = part + tl.arange(0, BLOCK_PARTS)
        exists = program <= last
        slot = ((2 * program + (program == first).to(tl.int32)) * BLOCK_M + row).to(tl.int64)
        part_top = tl.load(part_lse + slot, mask=exists, other=float("-inf"))
        values = tl.load(part_out + slot[:, None] * HEAD_DIM + dim[None, :], mask=exists[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(part_top))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row of a tree that sees nothing in these parts
        weights = tl.exp2(part_top - base)
        shrink = tl.exp2(top - base)
        acc = acc * shrink + tl.sum(values * weights[:, None], 0)
        total = total * shrink + tl.sum(weights)
        top = new_top

    total = tl.where(total > 0, total, 1.0)
    acc = acc / total
    token, q_head = (token_0 + seq_row // GROUP).to(tl.int64), item % kv_heads * GROUP + seq_row % GROUP
    tl.store(out + token * stride_out_token + q_head * stride_out_head + dim, acc.to(out.dtype.element_ty))
    if lse is not None:
        tl.store(lse + token * (kv_heads * GROUP) + q_head, (top + tl.log2(total)) * 0.6931471805599453)
