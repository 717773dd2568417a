"""Top-k, top-p and min-p of a batch of rows in torch, for any device: fixed shapes, no value read back by the host.

Probabilities are counted as whole numbers, so a sum is the same in any order: alone, in a batch, on every device. masks_host.py is the CPU twin.
"""

from __future__ import annotations

import math

import torch

__all__ = ["WEIGHT_ONE", "keep_min_p", "keep_top_k", "keep_top_p", "scale", "share", "weights"]

WEIGHT_ONE = 2.0**34
"""Weight of the best token. 2^19 tokens of it sum below 2^53, exact in a float64 too; all tokens that round to 0 together are below 1e-5 of it."""
_SHARE_ONE = 2**30


def scale(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """(logits − best of the row) / temperature, at most 0. temperature: float32 [R], > 0."""
    return (logits - logits.amax(dim=1, keepdim=True)).div_(temperature[:, None])


def weights(distance: torch.Tensor) -> torch.Tensor:
    """Probability relative to the best token's, in units of 1 / WEIGHT_ONE: whole numbers in float32. distance: as from `scale`."""
    return distance.exp().mul_(WEIGHT_ONE).floor_()


def share(p: float) -> int:
    """p in units of 2^-30. The target of a nucleus is total × share >> 30, at least 1."""
    return round(p * _SHARE_ONE)


def keep_top_k(logits: torch.Tensor, top_k: torch.Tensor, largest_k: int) -> torch.Tensor:
    """Forbids, in place, all but the k largest of each row, the lowest ids among equals. top_k: int64 [R]."""
    best = logits.topk(largest_k, dim=1).values
    cut = best.gather(1, top_k[:, None] - 1)
    return _forbid_below(logits, logits, cut, top_k[:, None])


def keep_top_p(logits: torch.Tensor, top_p: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Forbids, in place, what lies outside the nucleus. top_p: int64 [R], shares.  temperature: float32 [R]."""
    distance = scale(logits, temperature)
    ranked = distance.sort(dim=1, descending=True).values
    running = weights(ranked).to(torch.int64).cumsum(1)
    target = _times_share(running[:, -1:], top_p[:, None]).clamp_(min=1)
    last = (running < target).sum(1, keepdim=True).clamp_(max=logits.shape[1] - 1)
    return _forbid_below(logits, distance, ranked.gather(1, last), last + 1)


def keep_min_p(logits: torch.Tensor, log_min_p: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Forbids, in place, tokens whose log-probability lies further than log_min_p below the best. Both float32 [R]."""
    return logits.masked_fill_(scale(logits, temperature) < log_min_p[:, None], -math.inf)


def _times_share(total: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """total × p >> 30 without leaving 64 bits: the product is made of two halves."""
    high, low = total >> 30, total & (_SHARE_ONE - 1)
    return high * p + ((low * p) >> 30)


def _forbid_below(
    logits: torch.Tensor, values: torch.Tensor, cut: torch.Tensor, num_kept: torch.Tensor
) -> torch.Tensor:
    """Keeps the num_kept best by (value, lowest id); cut is the value of the last of them. cut, num_kept: [R, 1]."""
    num_ties = num_kept - (values > cut).sum(1, keepdim=True)
    ties = values == cut
    drop = (values < cut).logical_or_(ties.logical_and(ties.cumsum(1) > num_ties))
    return logits.masked_fill_(drop, -math.inf)
