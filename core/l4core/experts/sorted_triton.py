"""Experts for many tokens: tokens are sorted by expert, and a program computes a block of rows of one expert (sorted_blocks_triton).

The shared expert is not here: for many tokens it is an ordinary product, which BLAS does best. Its result is already in `out`, and the second launch
adds to it; every row belongs to one expert, so nobody else writes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from l4core.experts.sorted_blocks_triton import _down_kernel, _gate_up_kernel
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
    packed = x.index_select(0, order) if tile.tma else x
    _gate_up_kernel[_grid(num_tokens, num_experts, inter, tile)](
        _rows(packed, tile.rows, tile) if tile.tma else x,
        _rows(packed, tile.half, tile) if tile.tma and tile.half else x,
        _rows(packed, tile.extra, tile) if tile.tma and tile.extra else x,
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
        _rows(h, tile.rows, tile) if tile.tma else h,
        _rows(h, tile.half, tile) if tile.tma and tile.half else h,
        _rows(h, tile.extra, tile) if tile.tma and tile.extra else h,
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


def _rows(x: torch.Tensor, rows: int, tile: Tile) -> TensorDescriptor:
    """Of sorted rows [T, K] in blocks of `rows`; what lies behind the last one reads as zero."""
    return TensorDescriptor.from_tensor(x, [rows, tile.inputs])


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
    blocks = num_tokens // (tile.rows + tile.extra) + min(num_experts, num_tokens)
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
