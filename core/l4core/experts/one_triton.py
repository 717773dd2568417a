"""Experts for a single token, where all there is to do is to read weights: two launches without tensor cores.

A program has some outputs, goes along the inputs of their rows and adds at the end. Neither sums between programs nor a list of experts are needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from l4core.experts.tiles import Tile
from l4core.ops.overlap_triton import launch_options, let_next_start, wait_for_last
from l4core.plugin_api import ExpertWeights


def one_token(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    score: torch.Tensor,
    weights: ExpertWeights,
    gate_up_tile: Tile,
    down_tile: Tile,
) -> torch.Tensor:
    """See ExpertKernel.forward; T = 1. The tiles' columns divide the intermediate and the hidden size."""
    hidden, inter = x.shape[1], weights.down.shape[2]
    shared = weights.shared_gate_up is not None
    h = x.new_empty(1 + shared, inter)
    out = torch.empty_like(x)
    _one_gate_up_kernel[(inter // gate_up_tile.columns, 1 + shared)](
        x,
        expert_ids,
        score,
        weights.gate_up,
        weights.shared_gate_up,
        h,
        weights.gate_up.stride(0),
        H=hidden,
        I=inter,
        SHARED=shared,
        **_constants(gate_up_tile),
        **launch_options(x),
    )
    _one_down_kernel[(hidden // down_tile.columns,)](
        h,
        expert_ids,
        weights.down,
        weights.shared_down,
        out,
        weights.down.stride(0),
        H=hidden,
        I=inter,
        SHARED=shared,
        **_constants(down_tile),
        **launch_options(x),
    )
    return out


def _constants(tile: Tile) -> dict[str, int]:
    return {"COLUMNS": tile.columns, "DEPTH": tile.inputs, "num_warps": tile.warps, "num_stages": tile.stages}


@triton.jit
def _one_gate_up_kernel(
    x,
    expert_ids,
    score,
    gate_up,
    shared_gate_up,
    h,
    stride_expert,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    SHARED: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (I // COLUMNS, groups): the shared expert first."""
    if PDL:
        let_next_start()
        wait_for_last()
    group = tl.program_id(1)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if SHARED and group == 0:
        weight = shared_gate_up
        scale = 1.0
    else:
        expert = tl.load(expert_ids)
        if expert < 0:  # another rank's, which `down` leaves out
            return
        weight = gate_up + expert.to(tl.int64) * stride_expert
        scale = tl.load(score)
    k = tl.arange(0, DEPTH)
    gate_at = weight + n[:, None] * H + k[None, :]
    up_at = gate_at + I * H
    gates = tl.zeros([COLUMNS, DEPTH], tl.float32)
    ups = tl.zeros([COLUMNS, DEPTH], tl.float32)
    for begin in range(0, H, DEPTH):
        gates += _products(x, gate_at, begin, k, H, DEPTH)
        ups += _products(x, up_at, begin, k, H, DEPTH)
    gate = tl.sum(gates, axis=1) * scale
    up = tl.sum(ups, axis=1) * scale
    tl.store(h + group * I + n, (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty))


@triton.jit
def _products(x, at, begin, k, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """float32 [COLUMNS, DEPTH]: inputs begin + k of x [SIZE], each times the weights at `at` + begin."""
    return _inputs(x, begin, k, SIZE, DEPTH) * _weights(at, begin, k, SIZE, DEPTH).to(tl.float32)


@triton.jit
def _inputs(x, begin, k, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    if SIZE % DEPTH == 0:
        inputs = tl.load(x + begin + k)
    else:
        inputs = tl.load(x + begin + k, mask=begin + k < SIZE, other=0.0)
    return inputs.to(tl.float32)[None, :]


@triton.jit
def _weights(at, begin, k, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    if SIZE % DEPTH == 0:
        weights = tl.load(at + begin, eviction_policy="evict_first")
    else:
        weights = tl.load(at + begin, mask=(begin + k < SIZE)[None, :], other=0.0, eviction_policy="evict_first")
    return weights


@triton.jit
def _one_down_kernel(
    h,
    expert_ids,
    down,
    shared_down,
    out,
    stride_expert,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    SHARED: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (H // COLUMNS,). What is known of the weights before the kernel ahead has ended is on its way by then: no kernel writes them."""
    if PDL:
        let_next_start()
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    at = n[:, None] * I + k[None, :]
    terms = tl.zeros([COLUMNS, DEPTH], tl.float32)
    if SHARED:
        first = _weights(shared_down + at, 0, k, I, DEPTH)
        if PDL:
            wait_for_last()
        terms = _inputs(h, 0, k, I, DEPTH) * first.to(tl.float32)
        for begin in range(DEPTH, I, DEPTH):
            terms += _products(h, shared_down + at, begin, k, I, DEPTH)
    elif PDL:
        wait_for_last()
    expert = tl.load(expert_ids)
    if expert >= 0:  # else another rank's
        routed = down + expert.to(tl.int64) * stride_expert + at
        for begin in range(0, I, DEPTH):
            terms += _products(h + SHARED * I, routed, begin, k, I, DEPTH)
    tl.store(out + n, tl.sum(terms, axis=1).to(out.dtype.element_ty))
