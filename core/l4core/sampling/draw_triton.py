"""The law of the draw as kernels, with top-p and min-p: no tensor of noise, no sort, the logits read twice. Same tokens as draw.draw_by_law after
masks.keep_top_p and masks.keep_min_p, on the same device.

    best      each program the largest logit of its share of a row, and the lowest id that has it
    scores    each program the best (logit − best) / T + noise of its share, and its share of the probability; greedy rows are done already
    pick      a program a row: the best of all shares, and whether it lies in the nucleus

A nucleus is the first part of the row's ranking. So a winner outside it shuts out itself and all that rank behind it, and the draw is repeated among
those before it: 1 + ln(1 / p) draws on average, one program's work. Only shares with a logit that good are looked at again.
A row's shares do not depend on other rows, so neither do its bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from l4core.plugin_ops.masks import WEIGHT_ONE
from l4core.plugin_ops.masks import share as share_of
from l4core.sampling.noise import NOISE_MAX, NOISE_MIN

BLOCK = 4096
"""Logits of one program."""
FEW_ROWS = 8
"""Up to this many rows the device is not filled: more threads for each share."""
COMPILE = {"enable_fp_fusion": False}
"""Every operation rounds, as in torch."""
_SPAN = tl.constexpr(NOISE_MAX - NOISE_MIN + 0.0625)
"""A token further below the best cannot win; the last term covers the rounding of a sum of size 32."""
_LARGEST_U = tl.constexpr(1.0 - 2.0**-24)
_SMALLEST_TEMPERATURE = tl.constexpr(1.1754943508222875e-38)
_WEIGHT_ONE = tl.constexpr(WEIGHT_ONE)
_WHOLE = tl.constexpr(share_of(1.0))
_NO_TOKEN = tl.constexpr(2**31 - 1)
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def draw_rows(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_p: torch.Tensor,
    log_min_p: torch.Tensor,
    out: torch.Tensor | None = None,
    last_tokens: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """logits: [R, V] of any floating dtype, rows contiguous.  temperature: float32 [R], 0 = greedy.  seeds, positions: int64 [R].
    top_p: int64 [R], as masks.share gives it, WHOLE = off.  log_min_p: float32 [R], −inf = off.

    → int64 [2, R], what the host wants to know in one piece: the tokens, and the 32 bits of each row's best logit as a float32, which is NaN where
    the row holds one. Where it is not finite the token is some id in range.  out: where to write that, contiguous.
    last_tokens, rows: int64 [N] and [R]; row i's token goes to last_tokens[rows[i]] too.
    """
    num_rows, vocab_size = logits.shape
    shares = triton.cdiv(vocab_size, BLOCK)
    values = torch.empty(2, num_rows, shares, dtype=torch.float32, device=logits.device)
    ids = torch.empty(2, num_rows, shares, dtype=torch.int32, device=logits.device)
    sums = torch.empty(num_rows, shares, dtype=torch.int64, device=logits.device)
    drawn = torch.empty(2, num_rows, dtype=torch.int64, device=logits.device) if out is None else out
    grid, block_shares = (num_rows, shares), triton.next_power_of_2(shares)
    stride = logits.stride(0)
    _best_kernel[grid](logits, values, ids, stride, vocab_size, shares, BLOCK=BLOCK, num_warps=8, **COMPILE)
    _scores_kernel[grid](
        logits,
        temperature,
        seeds,
        positions,
        top_p,
        log_min_p,
        values,
        ids,
        sums,
        stride,
        vocab_size,
        shares,
        num_rows,
        SHARES=block_shares,
        BLOCK=BLOCK,
        num_warps=16 if num_rows <= FEW_ROWS else 8,
        **COMPILE,
    )
    _pick_kernel[(num_rows,)](
        logits,
        temperature,
        seeds,
        positions,
        top_p,
        log_min_p,
        values,
        ids,
        sums,
        drawn,
        last_tokens,
        rows,
        stride,
        vocab_size,
        shares,
        num_rows,
        SHARES=block_shares,
        BLOCK=BLOCK,
        num_warps=8,
        **COMPILE,
    )
    return drawn


@triton.jit
def _lowest_of_the_best(values, ids):
    """→ the largest value, NaN if there is one, and the lowest id that has it."""
    has_nan = tl.max((values != values).to(tl.int32), axis=0) > 0
    best = tl.max(values, axis=0)
    at = tl.where(has_nan, values != values, values == best)
    chosen = tl.min(tl.where(at, ids, _NO_TOKEN), axis=0)
    return tl.where(has_nan, float("nan"), best), chosen


@triton.jit
def _best_kernel(logits, values, ids, stride, vocab_size, shares, BLOCK: tl.constexpr):
    row, share = tl.program_id(0), tl.program_id(1)
    columns = share * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + columns, mask=columns < vocab_size, other=float("-inf"))
    best, at = _lowest_of_the_best(x.to(tl.float32), columns)
    tl.store(values + row * shares + share, best)
    tl.store(ids + row * shares + share, at)


@triton.jit
def _noise(word):
    """As noise.gumbel_from_words, rounding for rounding."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, _LARGEST_U)
    if _INTERPRETED:  # the interpreter has no device library: the same function by way of float64
        wide = u.to(tl.float64)
        inner = tl.where(wide < 1e-5, wide + wide * wide * 0.5, -tl.log(1.0 - wide)).to(tl.float32)
        return -tl.log(inner.to(tl.float64)).to(tl.float32)
    return -libdevice.log(-libdevice.log1p(-u))


@triton.jit
def _distances(logits, row, share, stride, vocab_size, best, t, BLOCK: tl.constexpr):
    """→ ids and (logit − best) / T of one share."""
    columns = share * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + columns, mask=columns < vocab_size, other=float("-inf"))
    return columns, tl.div_rn(x.to(tl.float32) - best, tl.full([BLOCK], t, tl.float32))


@triton.jit
def _scores(distance, share, seed, position, BLOCK: tl.constexpr):
    counter = (share * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    nothing = tl.zeros([BLOCK // 4], tl.uint32)
    low = nothing + (position & 0xFFFFFFFF).to(tl.uint32)
    high = nothing + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter, low, high, nothing)
    return distance + _noise(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))


@triton.jit
def _weights(distance):
    """As masks.weights."""
    if _INTERPRETED:
        power = tl.exp(distance)
    else:
        power = libdevice.exp(distance)
    return tl.floor(power * _WEIGHT_ONE).to(tl.int64)


@triton.jit
def _scores_kernel(
    logits,
    temperature,
    seeds,
    positions,
    top_p,
    log_min_p,
    values,
    ids,
    sums,
    stride,
    vocab_size,
    shares,
    num_rows,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, share = tl.program_id(0), tl.program_id(1)
    t = tl.load(temperature + row)
    if t > 0:
        all_shares = tl.arange(0, SHARES)
        bests = tl.load(values + row * shares + all_shares, mask=all_shares < shares, other=float("-inf"))
        best = tl.max(bests, axis=0)
        t = tl.maximum(t, _SMALLEST_TEMPERATURE)
        at = (num_rows + row) * shares + share
        mine = tl.load(values + row * shares + share)
        score, chosen = tl.full([], float("-inf"), tl.float32), share * BLOCK
        total = tl.full([], 0, tl.int64)
        if tl.div_rn(mine - best, t) >= -_SPAN:
            columns, distance = _distances(logits, row, share, stride, vocab_size, best, t, BLOCK)
            scores = _scores(distance, share, tl.load(seeds + row), tl.load(positions + row), BLOCK)
            scores = tl.where(distance < tl.load(log_min_p + row), float("-inf"), scores)
            score, chosen = _lowest_of_the_best(scores, columns)
            if tl.load(top_p + row) < _WHOLE:
                total = tl.sum(_weights(distance), axis=0)
        tl.store(values + at, score)
        tl.store(ids + at, chosen)
        tl.store(sums + row * shares + share, total)


@triton.jit
def _shares_of(values, row, shares, best, t, cut, SHARES: tl.constexpr):
    """→ [SHARES]: the numbers of the shares that hold a token as good as `cut`, SHARES for the others."""
    numbers = tl.arange(0, SHARES)
    bests = tl.load(values + row * shares + numbers, mask=numbers < shares, other=float("-inf"))
    return tl.where(tl.div_rn(bests - best, tl.full([SHARES], t, tl.float32)) >= cut, numbers, SHARES)


@triton.jit
def _weight_before(
    logits, values, row, stride, vocab_size, shares, best, t, cut, chosen, SHARES: tl.constexpr, BLOCK: tl.constexpr
):
    """Weight of all that rank before the token `chosen`, whose distance is `cut`."""
    total = tl.full([], 0, tl.int64)
    waiting = _shares_of(values, row, shares, best, t, cut, SHARES)
    share = tl.min(waiting, axis=0)
    while share < SHARES:
        columns, distance = _distances(logits, row, share, stride, vocab_size, best, t, BLOCK)
        is_before = (distance > cut) | ((distance == cut) & (columns < chosen))
        total += tl.sum(tl.where(is_before, _weights(distance), 0), axis=0)
        waiting = tl.where(waiting <= share, SHARES, waiting)
        share = tl.min(waiting, axis=0)
    return total


@triton.jit
def _draw_before(
    logits,
    values,
    row,
    stride,
    vocab_size,
    shares,
    best,
    t,
    cut,
    chosen,
    seed,
    position,
    floor,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The draw among all that rank before the token `chosen`: → id."""
    top, winner = tl.full([], float("-inf"), tl.float32), chosen
    waiting = _shares_of(values, row, shares, best, t, cut, SHARES)
    share = tl.min(waiting, axis=0)
    while share < SHARES:
        columns, distance = _distances(logits, row, share, stride, vocab_size, best, t, BLOCK)
        may_win = ((distance > cut) | ((distance == cut) & (columns < chosen))) & (distance >= floor)
        scores = _scores(distance, share, seed, position, BLOCK)
        score, at = _lowest_of_the_best(tl.where(may_win, scores, float("-inf")), columns)
        if score > top:
            top, winner = score, at
        waiting = tl.where(waiting <= share, SHARES, waiting)
        share = tl.min(waiting, axis=0)
    return winner


@triton.jit
def _times_share(total, p):
    """As masks._times_share."""
    return (total >> 30) * p + (((total & (_WHOLE - 1)) * p) >> 30)


@triton.jit
def _pick_kernel(
    logits,
    temperature,
    seeds,
    positions,
    top_p,
    log_min_p,
    values,
    ids,
    sums,
    drawn,
    last_tokens,
    rows,
    stride,
    vocab_size,
    shares,
    num_rows,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, SHARES)
    inside = columns < shares
    x = tl.load(values + row * shares + columns, mask=inside, other=float("-inf"))
    at = tl.load(ids + row * shares + columns, mask=inside, other=_NO_TOKEN)
    best, chosen = _lowest_of_the_best(x, at)
    tl.store(drawn + num_rows + row, best.to(tl.int32, bitcast=True).to(tl.int64))
    t = tl.load(temperature + row)
    if t > 0:
        scores = tl.load(values + (num_rows + row) * shares + columns, mask=inside, other=float("-inf"))
        at = tl.load(ids + (num_rows + row) * shares + columns, mask=inside, other=_NO_TOKEN)
        _, chosen = _lowest_of_the_best(scores, at)
        p = tl.load(top_p + row)
        if (p < _WHOLE) & (best > float("-inf")) & (best < float("inf")):
            t = tl.maximum(t, _SMALLEST_TEMPERATURE)
            total = tl.sum(tl.load(sums + row * shares + columns, mask=inside, other=0), axis=0)
            target = tl.maximum(_times_share(total, p), 1)
            seed, position, floor = tl.load(seeds + row), tl.load(positions + row), tl.load(log_min_p + row)
            source = logits + row.to(tl.int64) * stride
            cut = tl.div_rn(tl.load(source + chosen).to(tl.float32) - best, t)
            before = _weight_before(
                logits, values, row, stride, vocab_size, shares, best, t, cut, chosen, SHARES, BLOCK
            )
            while before >= target:
                chosen = _draw_before(
                    logits,
                    values,
                    row,
                    stride,
                    vocab_size,
                    shares,
                    best,
                    t,
                    cut,
                    chosen,
                    seed,
                    position,
                    floor,
                    SHARES,
                    BLOCK,
                )
                cut = tl.div_rn(tl.load(source + chosen).to(tl.float32) - best, t)
                before = _weight_before(
                    logits, values, row, stride, vocab_size, shares, best, t, cut, chosen, SHARES, BLOCK
                )
    token = tl.minimum(chosen, vocab_size - 1).to(tl.int64)
    tl.store(drawn + row, token)
    if last_tokens is not None:
        tl.store(last_tokens + tl.load(rows + row), token)
