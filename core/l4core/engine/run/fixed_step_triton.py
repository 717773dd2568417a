"""The inputs of a step of fixed shape, unpacked in one launch instead of some fifteen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BLOCK = 128
"""Token rows of one program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """Of B sequences: rows, starts (behind padding), seq_lens, int32 [B].  Of T token rows: token_ids, positions, draw_positions (of the token each
    row draws), seeds, top_p, int64 [T]; temperature, log_min_p, float32 [T]."""

    rows: torch.Tensor
    starts: torch.Tensor
    seq_lens: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    draw_positions: torch.Tensor
    seeds: torch.Tensor
    top_p: torch.Tensor
    temperature: torch.Tensor
    log_min_p: torch.Tensor


def unpack(inputs: torch.Tensor, pending: torch.Tensor, num_tokens: int) -> Unpacked:
    """inputs: as FixedStep.inputs, int64 [7 + num_tokens, B].  pending: int64 [lines, rows], whose line i, by block-table row, stands in place of a
    sequence's token i where that is negative."""
    num_seqs = inputs.shape[1]
    total = num_seqs * num_tokens
    small = torch.empty(3, num_seqs, dtype=torch.int32, device=inputs.device)
    wide = torch.empty(5, total, dtype=torch.int64, device=inputs.device)
    floats = torch.empty(2, total, dtype=torch.float32, device=inputs.device)
    _unpack_kernel[(triton.cdiv(total, BLOCK),)](
        inputs,
        pending,
        small,
        wide,
        floats,
        pending.stride(0),
        num_seqs,
        total,
        NUM_TOKENS=num_tokens,
        BLOCK=BLOCK,
        num_warps=4,
    )
    rows, starts, seq_lens = small
    token_ids, positions, draw_positions, seeds, top_p = wide
    return Unpacked(
        rows=rows,
        starts=starts,
        seq_lens=seq_lens,
        token_ids=token_ids,
        positions=positions,
        draw_positions=draw_positions,
        seeds=seeds,
        top_p=top_p,
        temperature=floats[0],
        log_min_p=floats[1],
    )


@triton.jit
def _unpack_kernel(
    inputs,
    pending,
    small,
    wide,
    floats,
    pending_stride,
    num_seqs,
    total,
    NUM_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < total
    b, i = t // NUM_TOKENS, t % NUM_TOKENS
    row = tl.load(inputs + b, mask=inside, other=0)
    start = tl.load(inputs + num_seqs + b, mask=inside, other=0)
    position = tl.load(inputs + 2 * num_seqs + b, mask=inside, other=0) + i
    seed = tl.load(inputs + 3 * num_seqs + b, mask=inside, other=0)
    top_p = tl.load(inputs + 4 * num_seqs + b, mask=inside, other=0)
    temperature = tl.load(inputs + 5 * num_seqs + b, mask=inside, other=0).to(tl.float64, bitcast=True)
    log_min_p = tl.load(inputs + 6 * num_seqs + b, mask=inside, other=0).to(tl.float64, bitcast=True)
    token = tl.load(inputs + (7 + i) * num_seqs + b, mask=inside, other=0)
    is_pending = inside & (token < 0)  # padding never is
    line = pending + (position - start) * pending_stride
    token = tl.where(is_pending, tl.load(line + row, mask=is_pending, other=0), token)
    first = inside & (i == 0)
    tl.store(small + b, row.to(tl.int32), mask=first)
    tl.store(small + num_seqs + b, start.to(tl.int32), mask=first)
    tl.store(small + 2 * num_seqs + b, (position + NUM_TOKENS).to(tl.int32), mask=first)
    tl.store(wide + t, token, mask=inside)
    tl.store(wide + total + t, position, mask=inside)
    tl.store(wide + 2 * total + t, position + 1, mask=inside)
    tl.store(wide + 3 * total + t, seed, mask=inside)
    tl.store(wide + 4 * total + t, top_p, mask=inside)
    tl.store(floats + t, temperature.to(tl.float32), mask=inside)
    tl.store(floats + total + t, log_min_p.to(tl.float32), mask=inside)
