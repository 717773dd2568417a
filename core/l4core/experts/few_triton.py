"""Experts for few tokens, where the time is that of reading weights: two launches, and nothing is sorted.

Every program holds all tokens as rows of its tile. Its expert's rows are real, the others are zero and cost nothing but arithmetic, which there is
plenty of. A program finds the distinct expert it is for by itself; the shared expert is one more group, so a launch reads all weights that are needed
and no others. A token's result is the sum of two: the routed expert's and the shared one's. Both are left in float32, and whichever program of a
block of columns comes last adds them, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from l4core.experts.tiles import Tile
from l4core.ops.dots_triton import dot_type
from l4core.ops.overlap_triton import launch_options, let_next_start, wait_for_last
from l4core.plugin_api import ExpertWeights

MIN_COLUMNS = 16
"""The narrowest tile of `few_down`: how many counters there may have to be."""


def few_tokens(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    score: torch.Tensor,
    weights: ExpertWeights,
    gate_up_tile: Tile,
    down_tile: Tile,
) -> torch.Tensor:
    """See ExpertKernel.forward. The tiles' `rows` are at least T."""
    h, hits, turns = few_gate_up(x, expert_ids, score, weights, gate_up_tile)
    return few_down(h, expert_ids, hits, turns, weights, down_tile)


def few_gate_up(
    x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ (h [routed, shared][T, I]; hits int32 [min(T, E)]: the distinct experts, −1 behind them; turns: zeros for `few_down` to count with)."""
    num_tokens, hidden = x.shape
    num_experts, inter = weights.gate_up.shape[0], weights.down.shape[2]
    shared = weights.shared_gate_up is not None
    h = x.new_empty(1 + shared, num_tokens, inter)
    groups = min(num_tokens, num_experts)
    hits = torch.empty(groups, dtype=torch.int32, device=x.device)
    turns = torch.empty(triton.cdiv(hidden, MIN_COLUMNS), dtype=torch.int32, device=x.device)
    _few_gate_up_kernel[(triton.cdiv(inter, tile.columns), groups + shared)](
        x,
        expert_ids,
        score,
        weights.gate_up,
        weights.shared_gate_up,
        h,
        hits,
        turns,
        num_tokens,
        x.stride(0),
        weights.gate_up.stride(0),
        H=hidden,
        I=inter,
        SHARED=shared,
        TURNS=turns.shape[0],
        BLOCK_TURNS=triton.next_power_of_2(turns.shape[0]),
        DOT_TYPE=dot_type(x),
        **tile.constants(),
        **launch_options(x),
    )
    return h, hits, turns


def few_down(
    h: torch.Tensor,
    expert_ids: torch.Tensor,
    hits: torch.Tensor,
    turns: torch.Tensor,
    weights: ExpertWeights,
    tile: Tile,
) -> torch.Tensor:
    """h, hits, turns: of `few_gate_up`, used up here → [T, H]."""
    _, num_tokens, inter = h.shape
    hidden = weights.down.shape[1]
    shared = weights.shared_down is not None
    out = h.new_empty(num_tokens, hidden)
    parts = torch.empty(2, num_tokens, hidden, dtype=torch.float32, device=h.device) if shared else None
    _few_down_kernel[(triton.cdiv(hidden, tile.columns), hits.shape[0] + shared)](
        h,
        expert_ids,
        weights.down,
        weights.shared_down,
        hits,
        turns,
        parts,
        out,
        num_tokens,
        hits.shape[0],
        weights.down.stride(0),
        H=hidden,
        I=inter,
        SHARED=shared,
        DOT_TYPE=dot_type(h),
        **tile.constants(),
        **launch_options(h),
    )
    return out


@triton.jit(do_not_specialize=["num_tokens"])
def _few_gate_up_kernel(
    x,
    expert_ids,
    score,
    gate_up,
    shared_gate_up,
    h,
    hits,
    turns,
    num_tokens,
    stride_x,
    stride_expert,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    SHARED: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_TURNS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        let_next_start()
        wait_for_last()
    column = tl.program_id(0)
    group = tl.program_id(1) - SHARED  # −1: the shared expert
    t = tl.arange(0, BLOCK_M)
    inside = t < num_tokens
    expert, weight = group.to(tl.int64), gate_up
    scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    mine = inside
    if column == 0 and tl.program_id(1) == 0:
        turn = tl.arange(0, BLOCK_TURNS)
        tl.store(turns + turn, turn * 0, mask=turn < TURNS)
    if SHARED and group < 0:
        weight = shared_gate_up
    else:
        hit, mine = _find_group(expert_ids, num_tokens, group, BLOCK_M)
        if column == 0:
            tl.store(hits + group, hit)
        scale = tl.load(score + t, mask=mine, other=0.0).to(tl.float32)
        expert = hit.to(tl.int64)
        weight = gate_up + expert * stride_expert
    if expert >= 0 or group < 0:
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x_at = x + t.to(tl.int64)[:, None] * stride_x + k[None, :]
        gate_at = weight + n.to(tl.int64)[:, None] * H + k[None, :]
        up_at = gate_at + I * H
        gate, up = _zeros(BLOCK_M, BLOCK_N, SWAP), _zeros(BLOCK_M, BLOCK_N, SWAP)
        for begin in range(0, H, BLOCK_K):
            if H % BLOCK_K == 0 and I % BLOCK_N == 0:
                rows = tl.load(x_at + begin, mask=mine[:, None], other=0.0)
                gates = tl.load(gate_at + begin)
                ups = tl.load(up_at + begin)
            else:
                some = begin + k < H
                here = (n < I)[:, None] & some[None, :]
                rows = tl.load(x_at + begin, mask=mine[:, None] & some[None, :], other=0.0)
                gates = tl.load(gate_at + begin, mask=here, other=0.0)
                ups = tl.load(up_at + begin, mask=here, other=0.0)
            gate = _add_product(gate, rows, gates, DOT_TYPE, SWAP)
            up = _add_product(up, rows, ups, DOT_TYPE, SWAP)
        to = h + (group < 0).to(tl.int64) * num_tokens * I
        if SWAP:
            value = _gated(gate * scale[None, :], up * scale[None, :])
            at = to + t.to(tl.int64)[None, :] * I + n[:, None]
            tl.store(at, value.to(h.dtype.element_ty), mask=mine[None, :] & (n < I)[:, None])
        else:
            value = _gated(gate * scale[:, None], up * scale[:, None])
            at = to + t.to(tl.int64)[:, None] * I + n[None, :]
            tl.store(at, value.to(h.dtype.element_ty), mask=mine[:, None] & (n < I)[None, :])


@triton.jit
def _find_group(expert_ids, num_tokens, group, BLOCK_M: tl.constexpr):
    """→ (the group-th distinct expert, counted from 0 in order of its first token, −1 when there are fewer; which tokens have it). A token's −1 is an
    expert that another rank holds."""
    t = tl.arange(0, BLOCK_M)
    inside = t < num_tokens
    ids = tl.load(expert_ids + t, mask=inside, other=-1)
    others = tl.load(expert_ids + t, mask=inside, other=-1)
    earlier = (ids[:, None] == others[None, :]) & (t[None, :] < t[:, None])
    first = inside & (ids >= 0) & (tl.max(earlier.to(tl.int32), axis=1) == 0)
    rank = tl.cumsum(first.to(tl.int32), 0) - 1
    hit = tl.max(tl.where(first & (rank == group), ids, -1), 0)
    return hit, inside & (ids == hit)


@triton.jit
def _zero(out, t, rows, column, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    at = out + t.to(tl.int64)[:, None] * H + n[None, :]
    tl.store(at, tl.zeros((BLOCK_M, BLOCK_N), out.dtype.element_ty), mask=rows[:, None] & (n < H)[None, :])


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    return acc


@triton.jit
def _add_product(acc, rows, weight, DOT_TYPE: tl.constexpr, SWAP: tl.constexpr):
    """acc + rows [M, K] · weight [N, K]ᵀ, or its transpose where SWAP."""
    if SWAP:
        acc = tl.dot(weight.to(DOT_TYPE), rows.to(DOT_TYPE).T, acc, input_precision="ieee")
    else:
        acc = tl.dot(rows.to(DOT_TYPE), weight.to(DOT_TYPE).T, acc, input_precision="ieee")
    return acc


@triton.jit
def _gated(gate, up):
    return gate * tl.sigmoid(gate) * up


@triton.jit(do_not_specialize=["num_tokens", "num_groups"])
def _few_down_kernel(
    h,
    expert_ids,
    down,
    shared_down,
    hits,
    turns,
    parts,
    out,
    num_tokens,
    num_groups,
    stride_expert,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    SHARED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        let_next_start()
        wait_for_last()
    column = tl.program_id(0)
    group = tl.program_id(1) - SHARED  # −1: the shared expert
    t = tl.arange(0, BLOCK_M)
    inside = t < num_tokens
    ids = tl.load(expert_ids + t, mask=inside, other=-1)
    mine, expert = inside, group
    weight, source = down, h
    if not SHARED and group == 0:
        _zero(out, t, inside & (ids < 0), column, H, BLOCK_M, BLOCK_N)  # tokens whose expert another rank holds
    if SHARED and group < 0:
        weight = shared_down
        source = h + num_tokens.to(tl.int64) * I
    else:
        expert = tl.load(hits + group)
        mine = inside & (ids == expert)
        weight = down + expert.to(tl.int64) * stride_expert
    if expert >= 0 or group < 0:
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        weight_at = weight + n.to(tl.int64)[:, None] * I + k[None, :]
        rows_at = source + t.to(tl.int64)[:, None] * I + k[None, :]
        acc = _zeros(BLOCK_M, BLOCK_N, SWAP)
        for begin in range(0, I, BLOCK_K):
            if I % BLOCK_K == 0 and H % BLOCK_N == 0:
                rows = tl.load(rows_at + begin, mask=mine[:, None], other=0.0)
                values = tl.load(weight_at + begin)
            else:
                some = begin + k < I
                rows = tl.load(rows_at + begin, mask=mine[:, None] & some[None, :], other=0.0)
                values = tl.load(weight_at + begin, mask=(n < H)[:, None] & some[None, :], other=0.0)
            acc = _add_product(acc, rows, values, DOT_TYPE, SWAP)
        if SWAP:
            acc = acc.T
        at = t.to(tl.int64)[:, None] * H + n[None, :]
        if SHARED:
            half = num_tokens.to(tl.int64) * H
            own = parts + at + (group < 0).to(tl.int64) * half
            tl.store(own, acc, mask=mine[:, None] & (n < H)[None, :])
            num_hits = tl.sum((tl.load(hits + t, mask=t < num_groups, other=-1) >= 0).to(tl.int32), 0)
            tl.debug_barrier()  # all of this program's sums are written before it counts itself
            if tl.atomic_add(turns + column, 1, sem="acq_rel") == num_hits:
                kept = inside[:, None] & (n < H)[None, :]
                routed = tl.load(parts + at, mask=kept & (ids >= 0)[:, None], other=0.0, volatile=True)
                shared = tl.load(parts + half + at, mask=kept, other=0.0, volatile=True)
                tl.store(out + at, (shared + routed).to(out.dtype.element_ty), mask=kept)
        else:
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=mine[:, None] & (n < H)[None, :])
