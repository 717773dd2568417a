"""Experts for many tokens: tokens are sorted by expert, and a program computes a block of rows of one expert.

The blocks are found by the programs themselves from how many tokens each expert has, so the launch is the same for every routing (the spare programs
end at once) and nothing is read back. The shared expert is not here: for many tokens it is an ordinary product, which BLAS does best. Its result is
already in `out`, and the second launch adds to it; every row belongs to one expert, so nobody else writes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from l4core.experts.tiles import Tile
from l4core.ops.dots_triton import dot_type
from l4core.ops.overlap_triton import launch_options, let_next_start, wait_for_last
from l4core.plugin_api import ExpertWeights

SORT_BLOCK = 128
SCAN_BLOCK = 1024


def sort_by_expert(expert_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """expert_ids int32 [T] → (order int32 [T]: sorted row → token, stable; ends int32 [E]: the row behind each expert's last). Tokens whose expert
    another rank holds, −1, come behind all others."""
    num_tokens = expert_ids.shape[0]
    order = torch.empty_like(expert_ids)
    ends = expert_ids.new_empty(num_experts)
    block = max(triton.next_power_of_2(num_experts), 2)
    _sort_kernel[(triton.cdiv(num_tokens, SORT_BLOCK),)](
        expert_ids,
        order,
        ends,
        num_tokens,
        num_experts,
        BLOCK=SORT_BLOCK,
        SCAN=min(SCAN_BLOCK, max(triton.next_power_of_2(num_tokens), 16)),
        BLOCK_E=block,
        num_warps=4,
        **launch_options(expert_ids),
    )
    return order, ends


def routed_experts(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    score: torch.Tensor,
    weights: ExpertWeights,
    out: torch.Tensor | None,
    gate_up_tile: Tile,
    down_tile: Tile,
) -> torch.Tensor:
    """The routed experts of ExpertKernel.forward, added to `out` [T, H] in place, or a new tensor where that is None."""
    order, ends = sort_by_expert(expert_ids, weights.gate_up.shape[0])
    h = sorted_gate_up(x, score, order, ends, weights.gate_up, gate_up_tile)
    return sorted_down(h, order, ends, weights.down, out, down_tile)


def sorted_gate_up(
    x: torch.Tensor, score: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, gate_up: torch.Tensor, tile: Tile
) -> torch.Tensor:
    """order, ends: of `sort_by_expert`.  gate_up [E, 2I, H] → [T, I] in sorted order."""
    num_tokens, hidden = x.shape
    num_experts, inter = gate_up.shape[0], gate_up.shape[1] // 2
    h = x.new_empty(num_tokens, inter)
    _gate_up_kernel[_grid(num_tokens, num_experts, inter, tile)](
        _rows(x.index_select(0, order), tile) if tile.tma else x,
        score,
        _gate_and_up(gate_up, tile) if tile.tma else gate_up,
        order,
        ends,
        h,
        num_tokens,
        x.stride(0),
        gate_up.stride(0),
        H=hidden,
        I=inter,
        E=num_experts,
        BLOCK_E=triton.next_power_of_2(num_experts),
        DOT_TYPE=dot_type(x),
        **tile.constants(grouped=True),
        **launch_options(x),
    )
    return h


def sorted_down(
    h: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    down: torch.Tensor,
    out: torch.Tensor | None,
    tile: Tile,
) -> torch.Tensor:
    """h: of `sorted_gate_up`, down [E, H, I] → [T, H], added to `out` where given."""
    num_tokens, inter = h.shape
    num_experts, hidden = down.shape[0], down.shape[1]
    add = out is not None
    out = h.new_zeros(num_tokens, hidden) if out is None else out  # rows without an expert here stay 0
    _down_kernel[_grid(num_tokens, num_experts, hidden, tile)](
        _rows(h, tile) if tile.tma else h,
        _weight(down, tile) if tile.tma else down,
        order,
        ends,
        out,
        num_tokens,
        out.stride(0),
        down.stride(0),
        H=hidden,
        I=inter,
        E=num_experts,
        BLOCK_E=triton.next_power_of_2(num_experts),
        DOT_TYPE=dot_type(h),
        ADD=add,
        **tile.constants(grouped=True),
        **launch_options(h),
    )
    return out


def _rows(x: torch.Tensor, tile: Tile) -> TensorDescriptor:
    """Of sorted rows [T, K]; what lies behind the last one reads as zero."""
    return TensorDescriptor.from_tensor(x, [tile.rows, tile.inputs])


def _weight(weight: torch.Tensor, tile: Tile) -> TensorDescriptor:
    """Of a weight [E, N, K] as E · N rows."""
    return TensorDescriptor.from_tensor(weight.view(-1, weight.shape[2]), [tile.columns, tile.inputs])


def _gate_and_up(weight: torch.Tensor, tile: Tile) -> TensorDescriptor:
    """Of [E, 2I, H], as [E, I, gate or up, H]."""
    experts, both, hidden = weight.shape
    shape, strides = [experts, both // 2, 2, hidden], [both * hidden, hidden, both // 2 * hidden, 1]
    return TensorDescriptor(weight, shape, strides, [1, tile.columns, 2, tile.inputs])


def _grid(num_tokens: int, num_experts: int, columns: int, tile: Tile) -> tuple[int]:
    """As many blocks of rows as any routing can need."""
    blocks = num_tokens // tile.rows + min(num_experts, num_tokens)
    return (blocks * triton.cdiv(columns, tile.columns),)


@triton.jit(do_not_specialize=["num_tokens"])
def _sort_kernel(
    expert_ids,
    order,
    ends,
    num_tokens,
    num_experts,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """A counting sort in one launch: every program counts all tokens, 64 KB at most, and places its own block."""
    if PDL:
        let_next_start()
        wait_for_last()
    begin = tl.program_id(0) * BLOCK
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.int32)
    lost_before = tl.zeros((), tl.int32)
    for start in range(0, num_tokens, SCAN):
        t = start + tl.arange(0, SCAN)
        ids = tl.load(expert_ids + t, mask=t < num_tokens, other=-1)
        held = ids >= 0
        total += tl.histogram(ids, BLOCK_E, mask=held)
        if start < begin:
            earlier = t < tl.minimum(begin, num_tokens)
            before += tl.histogram(ids, BLOCK_E, mask=earlier & held)
            lost_before += tl.sum((earlier & (ids < 0)).to(tl.int32), 0)
    end = tl.cumsum(total, 0)
    if begin == 0:
        tl.store(ends + e, end, mask=e < num_experts)
    t = begin + tl.arange(0, BLOCK)
    inside = t < num_tokens
    ids = tl.load(expert_ids + t, mask=inside, other=-1)
    others = begin + tl.arange(0, BLOCK)
    same = ids[:, None] == tl.load(expert_ids + others, mask=others < num_tokens, other=-1)[None, :]
    rank = tl.sum((same & (others[None, :] < t[:, None])).to(tl.int32), 1)
    first = tl.sum(tl.where(ids[:, None] == e[None, :], (end - total + before)[None, :], 0), 1)
    first = tl.where(ids < 0, tl.sum(total, 0) + lost_before, first)
    tl.store(order + first + rank, t, mask=inside)


@triton.jit
def _find_block(ends, columns, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """→ (expert, first row, row behind the last, column of this program). Programs in a row share their weights: GROUP blocks of rows go through the
    columns together. expert = E: there is nothing left for this program."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends + e, mask=e < E, other=0)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    blocks = tl.where(e < E, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    behind = tl.cumsum(blocks, 0)
    num_blocks = tl.sum(blocks, 0)
    program = tl.program_id(0)
    turn = program // (GROUP * columns)
    first = turn * GROUP
    width = tl.maximum(tl.minimum(num_blocks - first, GROUP), 1)
    inside = program % (GROUP * columns)
    block = first + inside % width
    column = inside // width
    expert = tl.sum((behind <= block).to(tl.int32), 0)
    if block >= num_blocks or column >= columns:
        expert = E
    me = e == expert
    row = tl.sum(tl.where(me, start + (block - behind + blocks) * BLOCK_M, 0), 0)
    return expert, row, tl.sum(tl.where(me, end, 0), 0), column


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_up_kernel(
    x,
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
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        let_next_start()
        wait_for_last()
    expert, row, end, column = _find_block(ends, (I + BLOCK_N - 1) // BLOCK_N, E, BLOCK_E, BLOCK_M, GROUP)
    if expert < E:
        m = row + tl.arange(0, BLOCK_M)
        inside = m < end
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        tokens = tl.load(order + m, mask=inside, other=0)
        if not TMA:
            x_at = x + tokens.to(tl.int64)[:, None] * stride_x + k[None, :]
            # Rows of gate and of up by turns: one product of twice the width, whose neighbours belong together.
            turn = tl.arange(0, 2 * BLOCK_N)
            column_of = column * BLOCK_N + turn // 2
            at = expert.to(tl.int64) * stride_expert + ((turn % 2) * I + column_of).to(tl.int64)[:, None] * H
            weight_at = gate_up + at + k[None, :]
        both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
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
        gate, up = tl.split(both.reshape(BLOCK_M, BLOCK_N, 2))
        scale = tl.load(score + tokens, mask=inside, other=0.0).to(tl.float32)[:, None]
        gate, up = gate * scale, up * scale
        value = gate * tl.sigmoid(gate) * up
        to = h + m.to(tl.int64)[:, None] * I + n[None, :]
        tl.store(to, value.to(h.dtype.element_ty), mask=inside[:, None] & (n < I)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _down_kernel(
    h,
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
    TMA: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        let_next_start()
        wait_for_last()
    expert, row, end, column = _find_block(ends, (H + BLOCK_N - 1) // BLOCK_N, E, BLOCK_E, BLOCK_M, GROUP)
    if expert < E:
        m = row + tl.arange(0, BLOCK_M)
        inside = m < end
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        if not TMA:
            rows_at = h + tl.minimum(m, num_tokens - 1).to(tl.int64)[:, None] * I + k[None, :]
            weight_at = down + expert.to(tl.int64) * stride_expert + n.to(tl.int64)[:, None] * I + k[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
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
        tokens = tl.load(order + m, mask=inside, other=0)
        to = out + tokens.to(tl.int64)[:, None] * stride_out + n[None, :]
        kept = inside[:, None] & (n < H)[None, :]
        if ADD:
            acc += tl.load(to, mask=kept, other=0.0).to(tl.float32)
        tl.store(to, acc.to(out.dtype.element_ty), mask=kept)
