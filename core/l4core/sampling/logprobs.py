"""Log-probabilities under the model's raw logits, before bias, penalties, masks and temperature."""

from __future__ import annotations

from collections.abc import Sequence

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
    return collect(outbox.fetch())


def measure(logits: torch.Tensor, token_ids: torch.Tensor, top: int, outbox: Outbox) -> None:
    """logits: float32 [N, V]; token_ids: int64 [N]. Puts into the outbox what `collect` reads: ids, log-probabilities, ranks, the top list."""
    chosen = token_ids[:, None]
    # log_softmax works row by row, so a row's bits do not depend on its neighbours (a plain sum over a lone row would be split among threads).
    logprobs = logits.log_softmax(dim=1)
    top_ids = _top_ids(logits, min(top, logits.shape[1]))
    outbox.add(token_ids)
    outbox.add(logprobs.gather(1, chosen)[:, 0])
    outbox.add((logits > logits.gather(1, chosen)).sum(1) + 1)
    outbox.add(top_ids)
    outbox.add(logprobs.gather(1, top_ids))


def collect(arrived: Sequence[HostArray]) -> list[TokenLogprobs]:
    """What any number of `measure` calls sent, in their order. rank: 1 + number of strictly larger logits; among equals the list has lower ids
    first."""
    return [
        TokenLogprobs(
            token_id=int(token_id),
            logprob=float(logprob),
            rank=int(rank),
            top=tuple(zip(top_ids.tolist(), top_logprobs.tolist(), strict=True)),
        )
        for start in range(0, len(arrived), _NUM_PARTS)
        for token_id, logprob, rank, top_ids, top_logprobs in zip(*arrived[start : start + _NUM_PARTS], strict=True)
    ]


def _top_ids(logits: torch.Tensor, top: int) -> torch.Tensor:
    """int64 [N, top], best first, lower ids first among equals: topk leaves the order of equals open, so the id becomes part of the key."""
    if top == 0:
        return torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns −0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers these sort like the floats
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = (ordered.to(torch.int64) << 32) - ids
    return (-keys.topk(top, dim=1).values) & 0xFFFFFFFF
