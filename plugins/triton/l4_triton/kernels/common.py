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
def widen_pairs(x, DTYPE: tl.constexpr, CONVERTS: tl.constexpr):
    """uint16, two neighbouring e4m3 values in each → (the first ones, the second ones) in DTYPE. e4m3 fits float16 exactly.

    CONVERTS: by NVIDIA's instruction for pairs, here of a register's two first values and of its two second ones. Else by moving bits: as the upper
    ones of a float16 they are the value / 256, subnormals included.
    """
    if CONVERTS:
        first, second = tl.inline_asm_elementwise(
            "{ .reg .b32 sorted; .reg .b16 low, high; prmt.b32 sorted, $2, 0, 0x3120; mov.b32 {low, high}, sorted;"
            " cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
            "=r,=r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        first = (((x & 0x80) << 8) | ((x & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        second = ((x & 0x8000) | ((x & 0x7F00) >> 1)).to(tl.float16, bitcast=True) * 256.0
    return first.to(DTYPE), second.to(DTYPE)


@triton.jit
def as_operand(x, DTYPE: tl.constexpr):
    """Stored keys or values as an operand of a dot; uint8 are the bits of e4m3."""
    if x.dtype == tl.uint8:
        x = (((x.to(tl.uint16) & 0x80) << 8) | ((x.to(tl.uint16) & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return x.to(DTYPE)


@triton.jit
def as_query(x, DTYPE: tl.constexpr):
    """Queries in the type dots are made in. bfloat16 reaches further than float16: what lies beyond saturates, as keys did when they were stored."""
    if DTYPE == tl.float16 and x.dtype == tl.bfloat16:  # noqa: SIM300
        x = tl.clamp(x.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(DTYPE)


@triton.jit
def soften(
    scores, top, total, key, position, prefix, ancestors, sees_prefix, owned, score_scale,
    MASKED: tl.constexpr, CHUNK: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax → weights [M, N], what earlier sums shrink by [M], top [M], total [M]."""
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
    return weights, shrink, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit
def load_rows(at, owned, MASKED: tl.constexpr):
    """Keys or values; 0 for what is not owned."""
    if MASKED:
        x = tl.load(at, mask=owned[:, None], other=0)
    else:
        x = tl.load(at)
    return x


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
    PAIRS: tl.constexpr,
    CONVERTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Adds keys begin … end − 1 to the online softmax of M rows; → acc [M, D], top [M], total [M], in powers of two.

    q: [M, D] in the type dots are made in.  k, v: pointers to this KV head.  limit: keys the sequence owns; nothing from there on is read, for it
    may be NaN and 0 · NaN is NaN.  MASKED: False promises that every row sees every key.  The next tile's pages are loaded a tile ahead.

    PAIRS: k and v are e4m3, read as uint16, strides too, for dots of 16 bits. A matrix instruction wants what is added up to lie side by side in a
    register; 16-bit values can be turned that way on their way out of shared memory, eight-bit ones cannot. So dimensions 0, 2, 4 … make one product
    and 1, 3, 5 … another.
    """
    pages = page_ids(table_row, begin, limit, width, PAGE, CHUNK > 0, BLOCK_N)
    if PAIRS:
        dim = tl.arange(0, HEAD_DIM // 2)
        q_first, q_second = tl.split(tl.reshape(q, [q.shape[0], HEAD_DIM // 2, 2]))
        acc_first, acc_second = tl.split(tl.reshape(acc, [q.shape[0], HEAD_DIM // 2, 2]))
        for n in tl.range(begin, end, BLOCK_N):
            pages_ahead = page_ids(table_row, n + BLOCK_N, limit, width, PAGE, CHUNK > 0, BLOCK_N)
            k_at = k + key_offsets(pages, n, stride_k_page, stride_k_slot, PAGE, BLOCK_N)[:, None] + dim[None, :]
            v_at = v + key_offsets(pages, n, stride_v_page, stride_v_slot, PAGE, BLOCK_N)[:, None] + dim[None, :]
            key = n + tl.arange(0, BLOCK_N)
            owned = key < limit
            k_first, k_second = widen_pairs(load_rows(k_at, owned, MASKED), q.dtype, CONVERTS)
            scores = tl.dot(q_first, tl.trans(k_first), input_precision="ieee")
            scores = tl.dot(q_second, tl.trans(k_second), scores, input_precision="ieee")
            weights, shrink, top, total = soften(
                scores,
                top,
                total,
                key,
                position,
                prefix,
                ancestors,
                sees_prefix,
                owned,
                score_scale,
                MASKED,
                CHUNK,
                TREE,
            )
            weights = weights.to(q.dtype)
            v_first, v_second = widen_pairs(load_rows(v_at, owned, MASKED), q.dtype, CONVERTS)
            acc_first = tl.dot(weights, v_first, acc_first * shrink[:, None], input_precision="ieee")
            acc_second = tl.dot(weights, v_second, acc_second * shrink[:, None], input_precision="ieee")
            pages = pages_ahead
        acc = tl.reshape(tl.join(acc_first, acc_second), [q.shape[0], HEAD_DIM])
    else:
        dim = tl.arange(0, HEAD_DIM)
        for n in tl.range(begin, end, BLOCK_N):
            pages_ahead = page_ids(table_row, n + BLOCK_N, limit, width, PAGE, CHUNK > 0, BLOCK_N)
            k_at = k + key_offsets(pages, n, stride_k_page, stride_k_slot, PAGE, BLOCK_N)[:, None] + dim[None, :]
            v_at = v + key_offsets(pages, n, stride_v_page, stride_v_slot, PAGE, BLOCK_N)[:, None] + dim[None, :]
            key = n + tl.arange(0, BLOCK_N)
            owned = key < limit
            keys = load_rows(k_at, owned, MASKED)
            scores = tl.dot(q, tl.trans(as_operand(keys, q.dtype)), input_precision="ieee")
            weights, shrink, top, total = soften(
                scores,
                top,
                total,
                key,
                position,
                prefix,
                ancestors,
                sees_prefix,
                owned,
                score_scale,
                MASKED,
                CHUNK,
                TREE,
            )
            values = load_rows(v_at, owned, MASKED)
            acc = tl.dot(
                weights.to(q.dtype), as_operand(values, q.dtype), acc * shrink[:, None], input_precision="ieee"
            )
            pages = pages_ahead
    return acc, top, total
