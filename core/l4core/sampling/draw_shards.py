"""The law of the draw over a vocabulary that ranks have shared out: each finds the best of its share, and the best of those is the token.

A share's scores are (logit − best of the share) / T + noise of the token's own id. Before the shares are compared, (best of the share − best of all)
/ T is added to each, which makes them the scores of the law; only the winners of the shares travel, twelve bytes a row and rank.
Ties go to the lowest id: shares lie in the order of ids, and in a share the first of equals wins.
"""

from __future__ import annotations

import torch

from l4core.parallel.ranks import Ranks
from l4core.platform import has_triton
from l4core.sampling.draw import argmax_lowest
from l4core.sampling.noise import gumbel_noise_at

__all__ = ["best_of_share", "choose", "draw_over_ranks"]

_SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny


def draw_over_ranks(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    first_id: int,
    ranks: Ranks,
    out: torch.Tensor | None = None,
    last_tokens: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """logits: [R, V / ranks] of the ids from first_id on, any floating dtype, rows contiguous.  temperature: float32 [R], 0 = greedy.
    seeds, positions: int64 [R].  → int64 [2, R]; that, and out, last_tokens and rows, as in draw_triton.draw_rows. One small gather."""
    if has_triton(logits.device.type):
        from l4core.sampling.draw_shards_triton import best_of_share as best_by_kernel
        from l4core.sampling.draw_shards_triton import choose as choose_by_kernel

        own = best_by_kernel(logits, temperature, seeds, positions, first_id)
        return choose_by_kernel(ranks.all_gather(own), temperature, out, last_tokens, rows)
    assert out is None
    assert last_tokens is None
    own = best_of_share(logits.float(), temperature, seeds, positions, first_id)
    return choose(ranks.all_gather(own), temperature)


def best_of_share(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, first_id: int
) -> torch.Tensor:
    """logits: float32. → int32 [3, R]: the bits of the share's best logit (NaN where it holds one) and of its winner's score, and that one's id."""
    at = argmax_lowest(logits)
    best = logits.gather(1, at[:, None])[:, 0]
    score = best.clone()
    sampled = torch.nonzero(temperature > 0)[:, 0] if logits.is_cpu else torch.arange(len(at), device=at.device)
    if len(sampled):
        wanted = temperature[sampled].clamp(min=_SMALLEST_TEMPERATURE)[:, None]
        ids = torch.arange(first_id, first_id + logits.shape[1], device=logits.device)[None, :]
        noise = gumbel_noise_at(seeds[sampled], positions[sampled], ids)
        scores = noise.add_((logits[sampled] - best[sampled, None]).div_(wanted))
        winner = argmax_lowest(scores)
        is_greedy = temperature[sampled] == 0
        at[sampled] = torch.where(is_greedy, at[sampled], winner)
        score[sampled] = torch.where(is_greedy, best[sampled], scores.gather(1, winner[:, None])[:, 0])
    return torch.stack((best.view(torch.int32), score.view(torch.int32), (at + first_id).to(torch.int32)))


def choose(shares: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """shares: int32 [ranks, 3, R], each as `best_of_share` gives it. → int64 [2, R]: the tokens, and the bits of the best logit of all."""
    bests, scores = shares[:, 0].view(torch.float32), shares[:, 1].view(torch.float32)
    best = bests.amax(0)
    shift = (bests - best).div_(temperature.clamp(min=_SMALLEST_TEMPERATURE))
    scores = torch.where(temperature > 0, scores + shift, scores).masked_fill_(bests == -torch.inf, -torch.inf)
    winner = argmax_lowest(scores.t().contiguous())
    token = shares[:, 2].t().gather(1, winner[:, None])[:, 0]
    return torch.stack((token, best.view(torch.int32))).to(torch.int64)
