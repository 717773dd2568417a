"""Gumbel noise of the sampling law, `argmax(logits / T + g(seed, position, token))`: a pure function of its three arguments.

Token t at position p under seed s takes word t % 4 of Philox-4x32-10 with counter (t // 4, p mod 2^32, p // 2^32, 0) and key s.
Fourth counter word 0 belongs to this noise; plugins draw their own coins with other values (plugin_ops.sampling.coins).
"""

from __future__ import annotations

import math

import torch

from l4core.plugin_ops.philox import key_words, philox_4x32, split_64

__all__ = ["NOISE_MAX", "NOISE_MIN", "gumbel_from_words", "gumbel_noise", "gumbel_noise_at"]

_LARGEST_U = 1.0 - 2.0**-24
NOISE_MAX = 22.875
"""Above every g: the smallest u is 2^-33, and −log(2^-33) = 22.874."""
NOISE_MIN = -2.8125
"""Below every g: u is at most 1 − 2^-24, and −log(24 · log 2) = −2.8116."""


def gumbel_from_words(words: torch.Tensor) -> torch.Tensor:
    """words: int64 in [0, 2^32). Returns float32 of the same shape, always finite.

    u = (x + ½)·2^-32 and g = −log(−log1p(−u)), each step rounded to float32. Likely tokens live at small u, where float32 is finest. The 2^7
    largest words would round u to 1 and g to −inf, which would tie with a forbidden token: u is held at the largest float32 below 1.
    """
    u = words.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=_LARGEST_U)
    return u.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise(
    seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int, device: torch.device | str
) -> torch.Tensor:
    """Noise of every token. seeds, positions: int64 [R]. Returns float32 [R, vocab_size] on `device`."""
    block = torch.arange(math.ceil(vocab_size / 4), device=device)[None, :]
    words = philox_4x32(_counter(block, positions.to(device)), _key(seeds.to(device)))
    return gumbel_from_words(torch.stack(words, dim=-1).flatten(1)[:, :vocab_size])


def gumbel_noise_at(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Noise of chosen tokens only, bit for bit that of `gumbel_noise`. seeds, positions: int64 [R]; token_ids: int64 [R, K]. float32 [R, K]."""
    words = philox_4x32(_counter(token_ids >> 2, positions), _key(seeds))
    lane = token_ids & 3
    low = torch.where(lane == 0, words[0], words[1])
    high = torch.where(lane == 2, words[2], words[3])
    return gumbel_from_words(torch.where(lane < 2, low, high))


def _counter(
    block: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = split_64(positions[:, None])
    return block, low, high, torch.zeros_like(low)


def _key(seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return key_words(seeds[:, None])
