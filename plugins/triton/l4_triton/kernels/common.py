"""What both kernels are made of: where keys lie, who sees them, and the loop of the online softmax.

Rows are query tokens × query heads of one KV head, packed: row r of a sequence is token r // GROUP, head r % GROUP. So a group of five wastes no
rows in a prefill, and a decode step reads each key once for all its query heads.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def page_ids(table_row, begin, limit, width, PAGE: tl.constexpr, RING: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pages of keys begin … begin + BLOCK_N − 1: one number where a page holds the whole tile, else one a key. From `limit` on: page 0."""
    if PAGE % BLOCK_N == 0:
        key = begin
    else:
        key = begin + tl.arange(0, BLOCK_N)
    column = key // PAGE
    if RING:
        column = column % width
    return tl.load(table_row + column, mask=key < limit, other=0)


@triton.jit
def key_offsets(pages, begin, stride_page, stride_slot, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """int64 [BLOCK_N]: elements from the start of a KV head's memory. Page × stride passes 2**32 elements in a pool of ordinary size."""
    key = begin + tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:
        slot = begin % PAGE + tl.arange(0, BLOCK_N)
    else:
        slot = key % PAGE
    return pages.to(tl.int64) * stride_page + slot * stride_slot


@triton.jit
def visible(key, position, prefix, ancestors, sees_prefix, CHUNK: tl.constexpr, TREE: tl.constexpr):
    """bool [M, N]. Causal, inside the query's chunk; or by the bitmap of ancestors, where key prefix + j is node j."""
    if TREE:
        node = key - prefix
        bit = (ancestors[:, None] >> tl.minimum(tl.maximum(node, 0), 63)[None, :].to(tl.int64)) & 1
        seen = tl.where(node[None, :] < 0, sees_prefix[:, None].to(tl.int32), bit.to(tl.int32)) != 0
    else:
        seen = key[None, :] <= position[:, None]
        if CHUNK > 0:
            seen = seen & (key[None, :] >= (position // CHUNK * CHUNK)[:, None])
    return seen


@triton.jit
def as_operand(x, DTYPE: tl.constexpr, SOFT_FP8: tl.constexpr):
    """Stored keys or values as an operand of a dot. SOFT_FP8: x holds the bits of e4m3 as uint8, for devices that cannot convert them: as the upper
    bits of a float16 they are the value / 256, subnormals included."""
    if SOFT_FP8:
        bits = x.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        x = half.to(tl.float16, bitcast=True) * 256.0
    return x.to(DTYPE)


@triton.jit
def attend_tiles(
    acc,
    top,
    total,
    q,
    position,
    prefix,
    ancestors,
    sees_prefix,
    k,
    v,
    table_row,
    begin,
    end,
    limit,
    width,
    stride_k_page,
    stride_k_slot,
    stride_v_page,
    stride_v_slot,
    score_scale,
    MASKED: tl.constexpr,
    PAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    TREE: tl.constexpr,
    SOFT_FP8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Adds keys begin … end − 1 to the online softmax of M rows; → acc [M, D], top [M], total [M], in powers of two.

    q: [M, D] in the type dots are made in.  k, v: pointers to this KV head.  limit: keys the sequence owns; nothing from there on is read, for it
    may be NaN and 0 · NaN is NaN.  MASKED: False promises that every row sees every key.  The next tile's pages are loaded a tile ahead.
    """
    dim = tl.arange(0, HEAD_DIM)
    pages = page_ids(table_row, begin, limit, width, PAGE, CHUNK > 0, BLOCK_N)
    for n in tl.range(begin, end, BLOCK_N):
        pages_ahead = page_ids(table_row, n + BLOCK_N, limit, width, PAGE, CHUNK > 0, BLOCK_N)
        k_at = k + key_offsets(pages, n, stride_k_page, stride_k_slot, PAGE, BLOCK_N)[:, None] + dim[None, :]
        v_at = v + key_offsets(pages, n, stride_v_page, stride_v_slot, PAGE, BLOCK_N)[:, None] + dim[None, :]
        if MASKED:
            key = n + tl.arange(0, BLOCK_N)
            owned = key < limit
            keys = tl.load(k_at, mask=owned[:, None], other=0.0)
        else:
            keys = tl.load(k_at)
        scores = tl.dot(q, tl.trans(as_operand(keys, q.dtype, SOFT_FP8)), input_precision="ieee")
        if MASKED:
            seen = visible(key, position, prefix, ancestors, sees_prefix, CHUNK, TREE) & owned[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * score_scale)
        if MASKED:
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
        else:
            base = new_top
        weights = tl.exp2(scores * score_scale - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if MASKED:
            values = tl.load(v_at, mask=owned[:, None], other=0.0)
        else:
            values = tl.load(v_at)
        acc = tl.dot(weights.to(q.dtype), as_operand(values, q.dtype, SOFT_FP8), acc, input_precision="ieee")
        top = new_top
        pages = pages_ahead
    return acc, top, total
