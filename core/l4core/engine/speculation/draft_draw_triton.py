"""A draft's guesses as two small kernels: the law's draw over its own vocabulary, whose noise is that of the target's token ids.

    share   each program the best of its share of a row: the logit, or logit / T + noise
    pick    a program a row: the best of all shares, as a target id

What is guessed decides how fast answers come, never what they are; so masks and penalties are left out, and scores may round as they like.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from l4core.ops.overlap_triton import launch_options, let_next_start, wait_for_last
from l4core.sampling.draw_triton import _lowest_of_the_best, _noise

BLOCK = 1024
_COLDEST = tl.constexpr(1e-6)


def draw_guesses(
    logits: torch.Tensor,
    offsets: torch.Tensor,
    temperature: torch.Tensor | None,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """logits: [B, V] of any floating dtype, rows contiguous.  offsets: int64 [V], draft id j is target id j + offsets[j].
    temperature: float32 [B], 0 = greedy; None = all are.  seeds, positions: int64 [B].  → int64 [B], target ids."""
    num_rows, vocab_size = logits.shape
    shares = triton.cdiv(vocab_size, BLOCK)
    values = torch.empty(num_rows, shares, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, shares, dtype=torch.int32, device=logits.device)
    drawn = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    options = launch_options(logits)
    _share_kernel[(num_rows, shares)](
        logits,
        offsets,
        temperature,
        seeds,
        positions,
        values,
        ids,
        logits.stride(0),
        vocab_size,
        BLOCK=BLOCK,
        **options,
    )
    _pick_kernel[(num_rows,)](
        values, ids, offsets, drawn, vocab_size, shares, SHARES=triton.next_power_of_2(shares), **options
    )
    return drawn


@triton.jit
def _noise_at(seed, position, tokens, BLOCK: tl.constexpr):
    """As noise.gumbel_noise_at, one row."""
    nothing = tl.zeros([BLOCK], tl.uint32)
    low = nothing + (position & 0xFFFFFFFF).to(tl.uint32)
    high = nothing + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, (tokens >> 2).to(tl.uint32), low, high, nothing)
    lane = tokens & 3
    return _noise(tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)))


@triton.jit
def _share_kernel(
    logits,
    offsets,
    temperature,
    seeds,
    positions,
    values,
    ids,
    stride,
    vocab_size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        let_next_start()
    row, share = tl.program_id(0), tl.program_id(1)
    columns = share * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    tokens = columns + tl.load(offsets + columns, mask=inside, other=0)
    if PDL:
        wait_for_last()
    x = tl.load(logits + row.to(tl.int64) * stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    if temperature is not None:
        t = tl.load(temperature + row)
        if t > 0:
            noise = _noise_at(tl.load(seeds + row), tl.load(positions + row), tokens, BLOCK)
            x = x / tl.maximum(t, _COLDEST) + noise
    best, at = _lowest_of_the_best(x, columns)
    place = row * tl.num_programs(1) + share
    tl.store(values + place, best)
    tl.store(ids + place, at)


@triton.jit
def _pick_kernel(values, ids, offsets, drawn, vocab_size, shares, SHARES: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        let_next_start()
        wait_for_last()
    row, columns = tl.program_id(0), tl.arange(0, SHARES)
    inside = columns < shares
    x = tl.load(values + row * shares + columns, mask=inside, other=float("-inf"))
    at = tl.load(ids + row * shares + columns, mask=inside, other=2**31 - 1)
    _, chosen = _lowest_of_the_best(x, at)
    chosen = tl.minimum(chosen, vocab_size - 1)
    tl.store(drawn + row, chosen + tl.load(offsets + chosen))
