"""Log-probabilities under the model's raw logits, before bias, penalties, masks and temperature."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from l4core.request import TokenLogprobs
from l4core.sampling.blocks import HostArray, Outbox, rows_per_block

__all__ = ["by_definition", "collect", "measure", "prompt_logprobs"]

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
    top = min(top, logits.shape[1])
    measured = (
        _on_host(logits, token_ids, top) if logits.device.type == "cpu" else by_definition(logits, token_ids, top)
    )
    for tensor in (token_ids, *measured):
        outbox.add(tensor)


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


def by_definition(logits: torch.Tensor, token_ids: torch.Tensor, top: int) -> tuple[torch.Tensor, ...]:
    """On any device: log-probabilities float32 [N], ranks int64 [N], top ids int64 [N, top], their log-probabilities float32 [N, top]."""
    chosen = logits.gather(1, token_ids[:, None])
    best = logits.amax(dim=1, keepdim=True)
    # Probabilities are added as whole numbers of 2^-40: exact in any order, so a row has the same bits alone and in a batch.
    units = (logits - best).exp_().mul_(2.0**40).round_().to(torch.int64).sum(1, keepdim=True)
    log_total = units.to(torch.float32).mul_(2.0**-40).log_()
    top_ids = _top_ids(logits, top)
    top_logprobs = logits.gather(1, top_ids) - best - log_total
    return (chosen - best - log_total)[:, 0], (logits > chosen).sum(1) + 1, top_ids, top_logprobs


def _top_ids(logits: torch.Tensor, top: int) -> torch.Tensor:
    """int64 [N, top], best first, lower ids first among equals: topk leaves the order of equals open, so the id becomes part of the key."""
    if top == 0:
        return torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns −0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers these sort like the floats
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = (ordered.to(torch.int64) << 32) - ids
    return (-keys.topk(top, dim=1).values) & 0xFFFFFFFF


def _on_host(logits: torch.Tensor, token_ids: torch.Tensor, top: int) -> tuple[torch.Tensor, ...]:
    """`by_definition` on a CPU, a row at a time, several times faster; sums in float64, in one order whatever the batch and the threads. (The float32
    log_softmax of torch is off by 3e-5 there at 150,000 tokens.)"""
    logprobs = np.empty(len(logits), dtype=np.float32)
    ranks = np.empty(len(logits), dtype=np.int64)
    top_ids = np.zeros((len(logits), top), dtype=np.int64)
    top_logprobs = np.zeros((len(logits), top), dtype=np.float32)
    for i, (row, token_id) in enumerate(zip(logits.numpy(), token_ids.tolist(), strict=True)):
        best = row.max()
        with np.errstate(invalid="ignore"):  # a row without a finite logit: its request has failed
            log_total = best + np.log(torch.from_numpy(row - best).exp_().double().numpy().sum())
        logprobs[i] = row[token_id] - log_total
        ranks[i] = np.count_nonzero(row > row[token_id]) + 1
        listed = _best_of_row(row, top)
        top_ids[i, : len(listed)] = listed
        top_logprobs[i, : len(listed)] = row[listed] - log_total
    return tuple(torch.from_numpy(array) for array in (logprobs, ranks, top_ids, top_logprobs))


def _best_of_row(row: npt.NDArray[np.float32], top: int) -> npt.NDArray[np.intp]:
    """Ids of the `top` largest, best first, lower ids first among equals. Fewer where the row holds NaN."""
    if top == 0:
        return np.empty(0, dtype=np.intp)
    ids = np.flatnonzero(row >= np.partition(row, len(row) - top)[len(row) - top])
    return ids[np.argsort(-row[ids], kind="stable")][:top]
