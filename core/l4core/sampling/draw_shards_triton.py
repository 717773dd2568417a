"""draw_shards.py as kernels: no tensor of noise, and the bits of its torch twin.

best      each program the largest logit of its block of the share, and the lowest id that has it
scores    each program the best (logit − best of the share) / T + noise of its block; greedy rows are done already
pick      a program a row: the best of all blocks, which is what travels
choose    a program a row: the best of all ranks
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from l4core.sampling.draw_triton import (
    _NO_TOKEN,
    _SMALLEST_TEMPERATURE,
    BLOCK,
    COMPILE,
    FEW_ROWS,
    _lowest_of_the_best,
    _noise,
)


def best_of_share(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, first_id: int
) -> torch.Tensor:
    """logits: [R, V / ranks] of any floating dtype, rows contiguous. → int32 [3, R], as draw_shards.best_of_share."""
    num_rows, size = logits.shape
    before = first_id % 4  # of the four ids that share a run of the generator, so many lie in the share before
    blocks = triton.cdiv(size + before, BLOCK)
    values = torch.empty(2, num_rows, blocks, dtype=torch.float32, device=logits.device)
    ids = torch.empty(2, num_rows, blocks, dtype=torch.int32, device=logits.device)
    found = torch.empty(3, num_rows, dtype=torch.int32, device=logits.device)
    grid, few = (num_rows, blocks), num_rows <= FEW_ROWS
    numbers = (logits.stride(0), size, before, blocks, num_rows)
    padded = triton.next_power_of_2(blocks)
    _block_best_kernel[grid](logits, values, ids, *numbers, BLOCK=BLOCK, num_warps=8, **COMPILE)
    _block_scores_kernel[grid](
        logits, temperature, seeds, positions, values, ids, first_id - before, *numbers,
        BLOCKS=padded, BLOCK=BLOCK, num_warps=16 if few else 8, **COMPILE,
    )  # fmt: skip
    _pick_block_kernel[(num_rows,)](
        temperature, values, ids, found, first_id, *numbers[1:], BLOCKS=padded, num_warps=1, **COMPILE
    )
    return found


def choose(
    shares: torch.Tensor,
    temperature: torch.Tensor,
    out: torch.Tensor | None = None,
    last_tokens: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """shares: int32 [ranks, 3, R]. → int64 [2, R], as draw_shards.choose; out, last_tokens, rows: as in draw_triton.draw_rows."""
    num_ranks, _, num_rows = shares.shape
    drawn = torch.empty(2, num_rows, dtype=torch.int64, device=shares.device) if out is None else out
    _choose_kernel[(num_rows,)](
        shares, temperature, drawn, last_tokens, rows, num_rows, num_ranks,
        RANKS=triton.next_power_of_2(num_ranks), num_warps=1, **COMPILE,
    )  # fmt: skip
    return drawn


@triton.jit
def _block_of(logits, row, block, stride, size, before, BLOCK: tl.constexpr):
    """→ columns of one block, which may begin before the share does, and their logits; −inf outside."""
    columns = block * BLOCK + tl.arange(0, BLOCK) - before
    inside = (columns >= 0) & (columns < size)
    x = tl.load(logits + row.to(tl.int64) * stride + columns, mask=inside, other=float("-inf"))
    return columns, x.to(tl.float32)


@triton.jit
def _block_best_kernel(logits, values, ids, stride, size, before, blocks, num_rows, BLOCK: tl.constexpr):
    row, block = tl.program_id(0), tl.program_id(1)
    columns, x = _block_of(logits, row, block, stride, size, before, BLOCK)
    best, at = _lowest_of_the_best(x, columns)
    tl.store(values + row * blocks + block, best)
    tl.store(ids + row * blocks + block, at)


@triton.jit
def _block_scores_kernel(
    logits,
    temperature,
    seeds,
    positions,
    values,
    ids,
    first,
    stride,
    size,
    before,
    blocks,
    num_rows,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, block = tl.program_id(0), tl.program_id(1)
    t = tl.load(temperature + row)
    if t > 0:
        numbers = tl.arange(0, BLOCKS)
        bests = tl.load(values + row * blocks + numbers, mask=numbers < blocks, other=float("-inf"))
        best = tl.max(bests, axis=0)
        columns, x = _block_of(logits, row, block, stride, size, before, BLOCK)
        distance = tl.div_rn(x - best, tl.full([BLOCK], tl.maximum(t, _SMALLEST_TEMPERATURE), tl.float32))
        counter = (first // 4 + block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        position = tl.load(positions + row)
        nothing = tl.zeros([BLOCK // 4], tl.uint32)
        low = nothing + (position & 0xFFFFFFFF).to(tl.uint32)
        high = nothing + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(tl.load(seeds + row), counter, low, high, nothing)
        scores = distance + _noise(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))
        score, chosen = _lowest_of_the_best(scores, columns)
        at = (num_rows + row) * blocks + block
        tl.store(values + at, score)
        tl.store(ids + at, chosen)


@triton.jit
def _pick_block_kernel(temperature, values, ids, found, first_id, size, before, blocks, num_rows, BLOCKS: tl.constexpr):
    row = tl.program_id(0)
    numbers = tl.arange(0, BLOCKS)
    inside = numbers < blocks
    x = tl.load(values + row * blocks + numbers, mask=inside, other=float("-inf"))
    at = tl.load(ids + row * blocks + numbers, mask=inside, other=_NO_TOKEN)
    best, chosen = _lowest_of_the_best(x, at)
    score = best
    if tl.load(temperature + row) > 0:
        scores = tl.load(values + (num_rows + row) * blocks + numbers, mask=inside, other=float("-inf"))
        at = tl.load(ids + (num_rows + row) * blocks + numbers, mask=inside, other=_NO_TOKEN)
        score, chosen = _lowest_of_the_best(scores, at)
    tl.store(found + row, best.to(tl.int32, bitcast=True))
    tl.store(found + num_rows + row, score.to(tl.int32, bitcast=True))
    tl.store(found + 2 * num_rows + row, first_id + tl.minimum(tl.maximum(chosen, 0), size - 1))


@triton.jit
def _choose_kernel(shares, temperature, drawn, last_tokens, rows, num_rows, num_ranks, RANKS: tl.constexpr):
    row = tl.program_id(0)
    rank = tl.arange(0, RANKS)
    inside = rank < num_ranks
    at = shares + rank * 3 * num_rows + row
    bests = tl.load(at, mask=inside, other=0).to(tl.float32, bitcast=True)
    bests = tl.where(inside, bests, float("-inf"))
    scores = tl.load(at + num_rows, mask=inside, other=0).to(tl.float32, bitcast=True)
    ids = tl.load(at + 2 * num_rows, mask=inside, other=_NO_TOKEN)
    best, _ = _lowest_of_the_best(bests, ids)
    t = tl.load(temperature + row)
    if t > 0:
        scores += tl.div_rn(bests - best, tl.full([RANKS], tl.maximum(t, _SMALLEST_TEMPERATURE), tl.float32))
    scores = tl.where(bests == float("-inf"), float("-inf"), scores)
    _, token = _lowest_of_the_best(scores, tl.where(inside, ids, _NO_TOKEN))
    token = tl.minimum(token, tl.max(tl.where(inside, ids, 0), axis=0)).to(tl.int64)
    tl.store(drawn + row, token)
    tl.store(drawn + num_rows + row, best.to(tl.int32, bitcast=True).to(tl.int64))
    if last_tokens is not None:
        tl.store(last_tokens + tl.load(rows + row), token)
