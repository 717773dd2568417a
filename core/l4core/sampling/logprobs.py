"""Log-probabilities under the model's raw logits, before bias, penalties, masks and temperature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from l4core.request import TokenLogprobs
from l4core.sampling.blocks import HostArray, Outbox, rows_per_block

__all__ = ["collect", "measure", "prompt_logprobs"]

_NUM_PARTS = 5
"""Tensors that one `measure` puts into the outbox."""


def prompt_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, top: int) -> list[TokenLogprobs]:
    """logits: float32 [N, V], row i predicts token_ids[i] (int64 [N], same device).  top: number of most likely tokens to list, ≥ 0.
    Memory beside the logits: a few blocks of rows. One transfer to the host."""
    outbox = Outbox()
    size = rows_per_block(logits)
    for start in range(0, len(logits), size):
        measure(logits[start : start + size], token_ids[start : start + size], top, outbox)
    return collect(outbox.fetch(), [top] * len(logits))


def measure(logits: torch.Tensor, token_ids: torch.Tensor, top: int, outbox: Outbox) -> None:
    """logits: float32 [N, V]; token_ids: int64 [N]. Puts into the outbox what `collect` reads: ids, log-probabilities, ranks, the top list."""
    chosen = logits.gather(1, token_ids[:, None])
    best = logits.amax(dim=1, keepdim=True)
    log_total = _log_total(logits - best)
    top_ids = _top_ids(logits, min(top, logits.shape[1]))
    outbox.add(token_ids)
    outbox.add((chosen - best - log_total)[:, 0])
    outbox.add((logits > chosen).sum(1) + 1)
    outbox.add(top_ids)
    outbox.add(logits.gather(1, top_ids) - best - log_total)


def collect(arrived: Sequence[HostArray], tops: Sequence[int]) -> list[TokenLogprobs]:
    """What any number of `measure` calls sent, in their order. tops: how long each line's top list shall be, at most what was measured.
    rank: 1 + number of strictly larger logits; among equals the list has lower ids first."""
    lines = [
        line
        for start in range(0, len(arrived), _NUM_PARTS)
        for line in zip(*arrived[start : start + _NUM_PARTS], strict=True)
    ]
    return [
        TokenLogprobs(
            token_id=int(token_id),
            logprob=float(logprob),
            rank=int(rank),
            top=tuple(zip(top_ids[:top].tolist(), top_logprobs[:top].tolist(), strict=True)),
        )
        for (token_id, logprob, rank, top_ids, top_logprobs), top in zip(lines, tops, strict=True)
    ]


def _log_total(distance: torch.Tensor) -> torch.Tensor:
    """log Σ exp(distance), float32 [N, 1], of distances ≤ 0. torch's float32 log_softmax is off by 3e-5 at 150,000 tokens on a CPU, and a plain
    sum's order depends on the number of rows and threads. So: float64 row by row on a CPU, whole numbers (units of 2^-40) elsewhere."""
    relative = distance.exp()
    if relative.device.type == "cpu":
        return torch.from_numpy(np.log(relative.double().numpy().sum(axis=1, keepdims=True))).to(torch.float32)
    units = relative.mul_(2.0**40).round_().to(torch.int64).sum(1, keepdim=True)
    return units.to(torch.float32).mul_(2.0**-40).log_()


def _top_ids(logits: torch.Tensor, top: int) -> torch.Tensor:
    """int64 [N, top], best first, lower ids first among equals: topk leaves the order of equals open, so the id becomes part of the key."""
    if top == 0:
        return torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns −0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers these sort like the floats
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = (ordered.to(torch.int64) << 32) - ids
    return (-keys.topk(top, dim=1).values) & 0xFFFFFFFF
