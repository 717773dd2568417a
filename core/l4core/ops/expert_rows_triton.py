"""Which rows a program of an expert kernel works on, and how programs that share an output add up.

FEW    T ≤ BLOCK_T and nothing is sorted: entry 0 of the grid is the shared expert, if there is one; the next ones stand for a token each and work
       for every token with the same expert, if theirs is the first of them. Row p < T of the intermediate is token p at its routed expert, row T + t
       token t at the shared one.
MANY   `order` lists tokens by expert and `ends` where each expert ends; row p is the p-th of them. The tiles of one expert and one piece of weight
       follow one another, so that the weight is read from memory once.
ALL    one matrix that every row meets: the shared expert beside MANY, and linear layers.
"""

from __future__ import annotations

import triton
import triton.language as tl

FEW, MANY, ALL = (tl.constexpr(mode) for mode in range(3))


@triton.jit
def few_rows(ids, entry, num_tokens, E: tl.constexpr, SHARED: tl.constexpr, BLOCK_T: tl.constexpr):
    """→ (expert, rows [BLOCK_T], tokens, which of them count, number of entries that work). ids: int32 [T], −1 where another rank
    holds the expert. An idle entry has expert −1."""
    t = tl.arange(0, BLOCK_T)
    inside = t < num_tokens
    mine = tl.load(ids + t, mask=inside, other=-1)
    entry -= SHARED
    shared = entry < 0
    expert = tl.sum(tl.where(t == entry, mine, 0), 0)
    same = (mine == expert) & inside
    first = tl.min(tl.where(same, t, BLOCK_T), 0)
    earlier = (mine[:, None] == mine[None, :]) & (t[None, :] < t[:, None])
    working = tl.sum(tl.where(inside & (mine >= 0) & (tl.sum(earlier.to(tl.int32), 1) == 0), 1, 0), 0)
    expert = tl.where(shared, E, tl.where(first == entry, expert, -1))
    return expert, tl.where(shared, num_tokens + t, t), t, tl.where(shared, inside, same), working


@triton.jit
def many_rows(order, ends, pid, n_blocks, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr):
    """→ (expert, rows, tokens, which of them count, block of outputs). ends: int32 [E].  A program too many has expert −1."""
    at = tl.arange(0, BLOCK_E)
    end = tl.load(ends + at, mask=at < E, other=0)
    begin = tl.load(ends + at - 1, mask=(at > 0) & (at < E), other=0)
    tiles = tl.where(at < E, (end - begin + BLOCK_T - 1) // BLOCK_T, 0)
    behind = tl.cumsum(tiles, 0) * n_blocks
    expert = tl.sum((behind <= pid).to(tl.int32), 0)
    mine = at == expert
    num_tiles = tl.maximum(tl.sum(tl.where(mine, tiles, 0), 0), 1)
    local = pid - (tl.sum(tl.where(mine, behind, 0), 0) - num_tiles * n_blocks)
    rows = tl.sum(tl.where(mine, begin, 0), 0) + (local % num_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < tl.sum(tl.where(mine, end, 0), 0)
    tokens = tl.load(order + rows, mask=inside, other=0)
    return tl.where(expert < E, expert, -1), rows, tokens, inside, local // num_tiles


@triton.jit
def all_rows(pid, num_tokens, BLOCK_T: tl.constexpr):
    """→ (rows, which of them count, block of outputs): the tiles of rows follow one another."""
    tiles = (num_tokens + BLOCK_T - 1) // BLOCK_T
    rows = (pid % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    return rows, rows < num_tokens, pid // tiles


@triton.jit
def find_rows(
    MODE: tl.constexpr, pid, ids, order, ends, num_tokens, n_blocks, E: tl.constexpr, SHARED: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """→ (expert, rows, tokens, which of them count, block of outputs, experts that work). An idle program has expert −1, ALL has expert 0."""
    if MODE == FEW:
        expert, rows, tokens, inside, working = few_rows(ids, pid // n_blocks, num_tokens, E, SHARED, BLOCK_T)
        return expert, rows, tokens, inside, pid % n_blocks, working
    elif MODE == MANY:
        expert, rows, tokens, inside, block = many_rows(order, ends, pid, n_blocks, E, BLOCK_E, BLOCK_T)
        return expert, rows, tokens, inside, block, 0
    else:
        rows, inside, block = all_rows(pid, num_tokens, BLOCK_T)
        return 0, rows, rows, inside, block, 0


@triton.jit
def weight_of(MODE: tl.constexpr, weight, shared_weight, expert, stride, E: tl.constexpr, SHARED: tl.constexpr):
    """Where an expert's weight begins. stride: elements of one expert's."""
    at = weight
    if MODE != ALL:
        at += expert.to(tl.int64) * stride
    if (MODE == FEW) & SHARED:
        at = tl.where(expert == E, shared_weight, at)
    return at


@triton.jit
def add_parts(
    MODE: tl.constexpr, ids, sums, acc, rows, tokens, inside, n, part, num_tokens, width, counter, wanted, SHARED: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Leaves acc [BLOCK_N, BLOCK_T] in sums float32 [PARTS, rows, width]; → (true for the last of `wanted` programs, then with the sum over parts
    and over a token's experts; which tokens it holds)."""
    size = (1 + SHARED) * num_tokens.to(tl.int64) * width
    tl.store(sums + part * size + rows.to(tl.int64)[None, :] * width + n[:, None], acc, mask=inside[None, :])
    last = is_last(counter, wanted)
    kept, routed, at = inside, inside, rows
    if MODE == FEW:  # whoever comes last adds up for every token
        kept, at = tokens < num_tokens, tokens
        routed = tl.load(ids + tokens, mask=kept, other=-1) >= 0
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    if last:
        from_row = at.to(tl.int64)[None, :] * width + n[:, None]
        for i in tl.static_range(PARTS):
            total += tl.load(sums + i * size + from_row, mask=routed[None, :], other=0.0, cache_modifier=".cg")
            if SHARED:
                behind = num_tokens.to(tl.int64) * width
                total += tl.load(
                    sums + i * size + behind + from_row, mask=kept[None, :], other=0.0, cache_modifier=".cg"
                )
    return last, total, kept


@triton.jit
def is_last(counter, wanted):
    """Counts the caller in; true for the one that completes `wanted`, which finds everybody's stores done and sets the counter back to 0."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == wanted - 1
    if last:
        tl.store(counter, 0)
    return last
