"""The two kernels of experts for many tokens: a program has a block of sorted rows of one expert, and a block of columns.

The blocks are found by the programs themselves from how many tokens each expert has, so the launch is the same for every routing (the spare programs
end at once) and nothing is read back. An expert's last block is often nearly empty, and its weights are read for it once more. So a block may have
EXTRA rows above those of the tile, a second product with the same weights; and where HALF rows are all there is, HALF rows are computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from l4core.ops.overlap_triton import let_next_start, wait_for_last


@triton.jit
def _find_block(
    ends,
    columns,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HALF: tl.constexpr,
    EXTRA: tl.constexpr,
    GROUP: tl.constexpr,
):
    """→ (expert, first row, row behind this block's last, column of this program). Programs in a row share their weights: GROUP blocks of rows go
    through the columns together. expert = E: there is nothing left for this program.

    EXTRA is for experts with few blocks, where no program shares weights and the last ones are waited for: longer blocks come first."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends + e, mask=e < E, other=0)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    rows: tl.constexpr = BLOCK_M + EXTRA
    size = tl.where(e < E, end - start, 0)
    blocks = (size + rows - 1) // rows
    num_blocks = tl.sum(blocks, 0)
    program = tl.program_id(0)
    turn = program // (GROUP * columns)
    first = turn * GROUP
    width = tl.maximum(tl.minimum(num_blocks - first, GROUP), 1)
    inside = program % (GROUP * columns)
    block = first + inside % width
    column = inside // width
    if EXTRA > 0:
        rest = size % rows
        longest = size // rows + (rest > BLOCK_M).to(tl.int32)
        middle = ((rest > HALF) & (rest <= BLOCK_M)).to(tl.int32)
        shortest = ((rest > 0) & (rest <= HALF)).to(tl.int32)
        num_longest, num_middle = tl.sum(longest, 0), tl.sum(middle, 0)
        expert, row = _owner(longest, start, block, rows, BLOCK_E)
        if block >= num_longest:
            expert, row = _owner(middle, end - rest, block - num_longest, rows, BLOCK_E)
        if block >= num_longest + num_middle:
            expert, row = _owner(shortest, end - rest, block - num_longest - num_middle, rows, BLOCK_E)
    else:
        expert, row = _owner(blocks, start, block, rows, BLOCK_E)
    if block >= num_blocks or column >= columns:
        expert = E
    return expert, row, tl.minimum(tl.sum(tl.where(e == expert, end, 0), 0), row + rows), column


@triton.jit
def _owner(blocks, start, block, rows: tl.constexpr, BLOCK_E: tl.constexpr):
    """blocks, start [BLOCK_E]: of each expert, how many and their first row → (expert, first row) of the block-th of all."""
    behind = tl.cumsum(blocks, 0)
    expert = tl.sum((behind <= block).to(tl.int32), 0)
    mine = tl.arange(0, BLOCK_E) == expert
    return expert, tl.sum(tl.where(mine, start + (block - behind + blocks) * rows, 0), 0)


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_up_kernel(
    x,
    x_half,
    x_extra,
    score,
    gate_up,
    order,
    ends,
    h,
    num_tokens,
    stride_x,
    stride_expert,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    EXTRA: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """x, gate_up: with TMA descriptors, x of sorted rows; x_half, x_extra: the same as x in blocks of HALF and EXTRA rows."""
    if PDL:
        let_next_start()
        wait_for_last()
    columns: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    expert, row, end, column = _find_block(ends, columns, E, BLOCK_E, BLOCK_M, HALF, EXTRA, GROUP)
    if expert < E:
        if EXTRA > 0 and end - row > BLOCK_M:
            _gate_up_block(
                x, x_extra, score, gate_up, order, h, expert, row, end, column, stride_x, stride_expert,
                H, I, DOT_TYPE, BLOCK_M, EXTRA, BLOCK_N, BLOCK_K, TMA,
            )  # fmt: skip
        elif HALF > 0 and end - row <= HALF:
            _gate_up_block(
                x_half, x_extra, score, gate_up, order, h, expert, row, end, column, stride_x, stride_expert,
                H, I, DOT_TYPE, HALF, 0, BLOCK_N, BLOCK_K, TMA,
            )  # fmt: skip
        else:
            _gate_up_block(
                x, x_extra, score, gate_up, order, h, expert, row, end, column, stride_x, stride_expert,
                H, I, DOT_TYPE, BLOCK_M, 0, BLOCK_N, BLOCK_K, TMA,
            )  # fmt: skip


@triton.jit
def _gate_up_block(
    x,
    x_extra,
    score,
    gate_up,
    order,
    h,
    expert,
    row,
    end,
    column,
    stride_x,
    stride_expert,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    DOT_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if not TMA:
        m = row + tl.arange(0, BLOCK_M)
        tokens = tl.load(order + m, mask=m < end, other=0)
        x_at = x + tokens.to(tl.int64)[:, None] * stride_x + k[None, :]
        # Rows of gate and of up by turns: one product of twice the width, whose neighbours belong together.
        turn = tl.arange(0, 2 * BLOCK_N)
        column_of = column * BLOCK_N + turn // 2
        at = expert.to(tl.int64) * stride_expert + ((turn % 2) * I + column_of).to(tl.int64)[:, None] * H
        weight_at = gate_up + at + k[None, :]
    both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    if EXTRA > 0:
        more = tl.zeros((EXTRA, 2 * BLOCK_N), tl.float32)
    for begin in range(0, H, BLOCK_K):
        if TMA:
            rows = x.load([row, begin])
            weight = gate_up.load([expert, column * BLOCK_N, 0, begin]).reshape(2 * BLOCK_N, BLOCK_K)
        elif H % BLOCK_K == 0 and I % BLOCK_N == 0:
            rows = tl.load(x_at + begin)  # those behind the last are token 0's: their results are not kept
            weight = tl.load(weight_at + begin)
        else:
            some = begin + k < H
            rows = tl.load(x_at + begin, mask=some[None, :], other=0.0)
            weight = tl.load(weight_at + begin, mask=(column_of < I)[:, None] & some[None, :], other=0.0)
        both = tl.dot(rows.to(DOT_TYPE), weight.to(DOT_TYPE).T, both, input_precision="ieee")
        if EXTRA > 0:
            rows = x_extra.load([row + BLOCK_M, begin])
            more = tl.dot(rows.to(DOT_TYPE), weight.to(DOT_TYPE).T, more, input_precision="ieee")
    _keep_gated(both, score, h, order, row, end, n, I, BLOCK_M, BLOCK_N)
    if EXTRA > 0:
        _keep_gated(more, score, h, order, row + BLOCK_M, end, n, I, EXTRA, BLOCK_N)


@triton.jit
def _keep_gated(both, score, h, order, row, end, n, I: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):  # noqa: E741
    """both [ROWS, 2 · BLOCK_N], gate and up by turns → h's columns n."""
    m = row + tl.arange(0, ROWS)
    inside = m < end
    tokens = tl.load(order + m, mask=inside, other=0)
    gate, up = tl.split(both.reshape(ROWS, BLOCK_N, 2))
    scale = tl.load(score + tokens, mask=inside, other=0.0).to(tl.float32)[:, None]
    gate, up = gate * scale, up * scale
    value = gate * tl.sigmoid(gate) * up
    to = h + m.to(tl.int64)[:, None] * I + n[None, :]
    tl.store(to, value.to(h.dtype.element_ty), mask=inside[:, None] & (n < I)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _down_kernel(
    h,
    h_half,
    h_extra,
    down,
    order,
    ends,
    out,
    num_tokens,
    stride_out,
    stride_expert,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    EXTRA: tl.constexpr,
    TMA: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """h, down: with TMA descriptors; h_half, h_extra: the same as h in blocks of HALF and EXTRA rows."""
    if PDL:
        let_next_start()
        wait_for_last()
    columns: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    expert, row, end, column = _find_block(ends, columns, E, BLOCK_E, BLOCK_M, HALF, EXTRA, GROUP)
    if expert < E:
        if EXTRA > 0 and end - row > BLOCK_M:
            _down_block(
                h, h_extra, down, order, out, expert, row, end, column, num_tokens, stride_out, stride_expert,
                H, I, DOT_TYPE, BLOCK_M, EXTRA, BLOCK_N, BLOCK_K, TMA, ADD,
            )  # fmt: skip
        elif HALF > 0 and end - row <= HALF:
            _down_block(
                h_half, h_extra, down, order, out, expert, row, end, column, num_tokens, stride_out, stride_expert,
                H, I, DOT_TYPE, HALF, 0, BLOCK_N, BLOCK_K, TMA, ADD,
            )  # fmt: skip
        else:
            _down_block(
                h, h_extra, down, order, out, expert, row, end, column, num_tokens, stride_out, stride_expert,
                H, I, DOT_TYPE, BLOCK_M, 0, BLOCK_N, BLOCK_K, TMA, ADD,
            )  # fmt: skip


@triton.jit
def _down_block(
    h,
    h_extra,
    down,
    order,
    out,
    expert,
    row,
    end,
    column,
    num_tokens,
    stride_out,
    stride_expert,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    DOT_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    ADD: tl.constexpr,
):
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if not TMA:
        m = tl.minimum(row + tl.arange(0, BLOCK_M), num_tokens - 1)
        rows_at = h + m.to(tl.int64)[:, None] * I + k[None, :]
        weight_at = down + expert.to(tl.int64) * stride_expert + n.to(tl.int64)[:, None] * I + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if EXTRA > 0:
        more = tl.zeros((EXTRA, BLOCK_N), tl.float32)
    for begin in range(0, I, BLOCK_K):
        if TMA:
            rows = h.load([row, begin])
            weight = down.load([expert * H + column * BLOCK_N, begin])
        elif I % BLOCK_K == 0 and H % BLOCK_N == 0:
            rows = tl.load(rows_at + begin)
            weight = tl.load(weight_at + begin)
        else:
            some = begin + k < I
            rows = tl.load(rows_at + begin, mask=some[None, :], other=0.0)
            weight = tl.load(weight_at + begin, mask=(n < H)[:, None] & some[None, :], other=0.0)
        acc = tl.dot(rows.to(DOT_TYPE), weight.to(DOT_TYPE).T, acc, input_precision="ieee")
        if EXTRA > 0:
            rows = h_extra.load([row + BLOCK_M, begin])
            more = tl.dot(rows.to(DOT_TYPE), weight.to(DOT_TYPE).T, more, input_precision="ieee")
    _keep_sum(acc, order, out, row, end, n, stride_out, H, BLOCK_M, ADD)
    if EXTRA > 0:
        _keep_sum(more, order, out, row + BLOCK_M, end, n, stride_out, H, EXTRA, ADD)


@triton.jit
def _keep_sum(acc, order, out, row, end, n, stride_out, H: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr):
    """acc [ROWS, columns n] → out, the rows of their tokens."""
    m = row + tl.arange(0, ROWS)
    inside = m < end
    tokens = tl.load(order + m, mask=inside, other=0)
    to = out + tokens.to(tl.int64)[:, None] * stride_out + n[None, :]
    kept = inside[:, None] & (n < H)[None, :]
    if ADD:
        acc += tl.load(to, mask=kept, other=0.0).to(tl.float32)
    tl.store(to, acc.to(out.dtype.element_ty), mask=kept)
