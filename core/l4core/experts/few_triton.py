"""Experts for few tokens, where the time is that of reading weights: two launches, and nothing is sorted.

Every program holds all tokens as rows of its tile. Its expert's rows are real, the others are zero and cost nothing but arithmetic, which there is
plenty of. Program column j of the first launch finds the j-th distinct expert by itself; column 0 is the shared expert, so one launch reads all
weights that are needed and no others. In the second launch a program owns columns of the result and goes through all those experts, so that the sum
of routed and shared needs neither atomics nor a third launch: every program does the same work, whatever the routing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from l4core.experts.tiles import Tile
from l4core.ops.device import COMPILE
from l4core.ops.dots_triton import dot_type
from l4core.plugin_api import ExpertWeights


def few_tokens(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    score: torch.Tensor,
    weights: ExpertWeights,
    gate_up_tile: Tile,
    down_tile: Tile,
) -> torch.Tensor:
    """See ExpertKernel.forward. The tiles' `rows` are at least T."""
    h, hits = few_gate_up(x, expert_ids, score, weights, gate_up_tile)
    return few_down(h, expert_ids, hits, weights, down_tile)


def few_gate_up(
    x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (h [routed, shared][T, I], hits int32 [min(T, E)]: the distinct experts, −1 behind them)."""
    num_tokens, hidden = x.shape
    num_experts, inter = weights.gate_up.shape[0], weights.down.shape[2]
    shared = weights.shared_gate_up is not None
    h = x.new_empty(1 + shared, num_tokens, inter)
    hits = torch.empty(min(num_tokens, num_experts), dtype=torch.int32, device=x.device)
    _few_gate_up_kernel[(triton.cdiv(inter, tile.columns), hits.shape[0] + shared)](
        x,
        expert_ids,
        score,
        weights.gate_up,
        weights.shared_gate_up,
        h,
        hits,
        num_tokens,
        x.stride(0),
        weights.gate_up.stride(0),
        H=hidden,
        I=inter,
        SHARED=shared,
        DOT_TYPE=dot_type(x),
        **tile.constants(),
        **COMPILE,
    )
    return h, hits


def few_down(
    h: torch.Tensor, expert_ids: torch.Tensor, hits: torch.Tensor, weights: ExpertWeights, tile: Tile
) -> torch.Tensor:
    """h, hits: of `few_gate_up` → [T, H]."""
    _, num_tokens, inter = h.shape
    hidden = weights.down.shape[1]
    out = h.new_empty(num_tokens, hidden)
    _few_down_kernel[(triton.cdiv(hidden, tile.columns),)](
        h,
        expert_ids,
        weights.down,
        weights.shared_down,
        hits,
        out,
        num_tokens,
        hits.shape[0],
        weights.down.stride(0),
        H=hidden,
        I=inter,
        SHARED=weights.shared_down is not None,
        DOT_TYPE=dot_type(h),
        **tile.constants(),
        **COMPILE,
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
    num_tokens,
    stride_x,
    stride_expert,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    SHARED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
):
    column = tl.program_id(0)
    group = tl.program_id(1) - SHARED  # −1: the shared expert
    t = tl.arange(0, BLOCK_M)
    inside = t < num_tokens
    expert = group.to(tl.int64)
    weight = gate_up
    scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    mine = inside
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
        gate = _zeros(BLOCK_M, BLOCK_N, SWAP)
        up = _zeros(BLOCK_M, BLOCK_N, SWAP)
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
    """→ (the group-th distinct expert, counted from 0 in order of its first token, −1 when there are fewer; which tokens have it)."""
    t = tl.arange(0, BLOCK_M)
    inside = t < num_tokens
    ids = tl.load(expert_ids + t, mask=inside, other=-1)
    others = tl.load(expert_ids + t, mask=inside, other=-1)
    earlier = (ids[:, None] == others[None, :]) & (t[None, :] < t[:, None])
    first = inside & (tl.max(earlier.to(tl.int32), axis=1) == 0)
    rank = tl.cumsum(first.to(tl.int32), 0) - 1
    hit = tl.max(tl.where(first & (rank == group), ids, -1), 0)
    return hit, inside & (ids == hit)


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
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    inside = t < num_tokens
    ids = tl.load(expert_ids + t, mask=inside, other=-1)
    num_hits = tl.sum((tl.load(hits + t, mask=t < num_groups, other=-1) >= 0).to(tl.int32), 0)
    STEPS: tl.constexpr = (I + BLOCK_K - 1) // BLOCK_K
    at = n.to(tl.int64)[:, None] * I + k[None, :]
    rows_at = h + t.to(tl.int64)[:, None] * I + k[None, :]
    acc = _zeros(BLOCK_M, BLOCK_N, SWAP)
    if SHARED:
        shared_at = rows_at + num_tokens.to(tl.int64) * I
        for step in range(STEPS):
            begin = step * BLOCK_K
            if I % BLOCK_K == 0 and H % BLOCK_N == 0:
                rows = tl.load(shared_at + begin, mask=inside[:, None], other=0.0)
                weight = tl.load(shared_down + at + begin)
            else:
                some = begin + k < I
                rows = tl.load(shared_at + begin, mask=inside[:, None] & some[None, :], other=0.0)
                weight = tl.load(shared_down + at + begin, mask=(n < H)[:, None] & some[None, :], other=0.0)
            acc = _add_product(acc, rows, weight, DOT_TYPE, SWAP)
    for step in range(
        num_hits * STEPS
    ):  # one loop over experts and their inputs: a loop inside a loop would run dry at each turn
        expert = tl.load(hits + step // STEPS)
        begin = (step % STEPS) * BLOCK_K
        mine = ids == expert
        from_expert = down + expert.to(tl.int64) * stride_expert + begin
        if I % BLOCK_K == 0 and H % BLOCK_N == 0:
            rows = tl.load(rows_at + begin, mask=mine[:, None], other=0.0)
            weight = tl.load(from_expert + at)
        else:
            some = begin + k < I
            rows = tl.load(rows_at + begin, mask=mine[:, None] & some[None, :], other=0.0)
            weight = tl.load(from_expert + at, mask=(n < H)[:, None] & some[None, :], other=0.0)
        acc = _add_product(acc, rows, weight, DOT_TYPE, SWAP)
    if SWAP:
        to = out + t.to(tl.int64)[None, :] * H + n[:, None]
        tl.store(to, acc.to(out.dtype.element_ty), mask=inside[None, :] & (n < H)[:, None])
    else:
        to = out + t.to(tl.int64)[:, None] * H + n[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=inside[:, None] & (n < H)[None, :])
