"""The router in two small launches: logits in pieces of the input side, then the best of their sums.

The pieces and the order in which they are added do not depend on how many tokens there are, so a token is routed alone as it is in a batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from l4core.ops.dots_triton import dot_type
from l4core.ops.overlap_triton import launch_options, let_next_start, wait_for_last

ROWS = 16
PIECE = 640
"""Inputs of one program: 8 pieces of the released models' 5,120."""
BLOCK_K = 64
STAGES = 3


def route_triton(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `router.route`. Rows of x may lie apart. Logits are added in float32 and never rounded."""
    num_tokens, hidden = x.shape
    num_experts = weight.shape[0]
    pieces = triton.cdiv(hidden, PIECE)
    parts = torch.empty(pieces, num_tokens, num_experts, dtype=torch.float32, device=x.device)
    expert_ids = torch.empty(num_tokens, dtype=torch.int32, device=x.device)
    score = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(num_tokens, ROWS)
    shape = {"E": num_experts, "ROWS": ROWS, "BLOCK_E": max(triton.next_power_of_2(num_experts), 16)}
    _logits_kernel[(blocks, pieces)](
        x,
        weight,
        parts,
        num_tokens,
        x.stride(0),
        H=hidden,
        PIECE=PIECE,
        BLOCK_K=BLOCK_K,
        DOT_TYPE=dot_type(x),
        **shape,
        num_warps=4,
        num_stages=STAGES,
        **launch_options(x),
    )
    _pick_kernel[(blocks,)](
        parts, expert_ids, score, num_tokens, PIECES=pieces, **shape, num_warps=4, **launch_options(x)
    )
    return expert_ids, score


@triton.jit(do_not_specialize=["num_tokens"])
def _logits_kernel(
    x,
    weight,
    parts,
    num_tokens,
    stride_x,
    H: tl.constexpr,
    E: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        let_next_start()
        wait_for_last()
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    piece = tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    x_at = x + t.to(tl.int64)[:, None] * stride_x
    weight_at = weight + e[:, None] * H
    acc = tl.zeros((ROWS, BLOCK_E), tl.float32)
    for begin in range(0, PIECE, BLOCK_K):
        at = piece * PIECE + begin + k
        rows = tl.load(x_at + at[None, :], mask=(t < num_tokens)[:, None] & (at < H)[None, :], other=0.0)
        weights = tl.load(weight_at + at[None, :], mask=(e < E)[:, None] & (at < H)[None, :], other=0.0)
        acc = tl.dot(rows.to(DOT_TYPE), weights.to(DOT_TYPE).T, acc, input_precision="ieee")
    to = parts + (piece.to(tl.int64) * num_tokens + t)[:, None] * E + e[None, :]
    tl.store(to, acc, mask=(t < num_tokens)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _pick_kernel(
    parts,
    expert_ids,
    score,
    num_tokens,
    PIECES: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        let_next_start()
        wait_for_last()
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)
    inside = t < num_tokens
    logits = tl.zeros((ROWS, BLOCK_E), tl.float32)
    for piece in tl.static_range(PIECES):
        from_piece = parts + (tl.full((), piece, tl.int64) * num_tokens + t)[:, None] * E + e[None, :]
        logits += tl.load(from_piece, mask=inside[:, None] & (e < E)[None, :], other=0.0)
    logits = tl.where((e < E)[None, :], logits, float("-inf"))
    best, expert = tl.max(logits, 1, return_indices=True, return_indices_tie_break_left=True)
    tl.store(expert_ids + t, expert, mask=inside)
    tl.store(score + t, tl.sigmoid(best), mask=inside)
