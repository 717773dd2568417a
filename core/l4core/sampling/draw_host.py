"""The law on a CPU without most of its work: tokens that cannot win are never given noise. Same tokens as `draw.draw_by_law`, bit for bit.

Noise lies in (NOISE_MIN, NOISE_MAX), so a token further than their difference below the best cannot win. Where few are nearer, only those get
noise (the usual case after top-p). Otherwise all Philox words are made, but only words small enough to beat a score already in hand get logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from l4core.plugin_ops.philox import seed_tensor
from l4core.sampling.noise import NOISE_MAX, NOISE_MIN, gumbel_from_words, gumbel_noise_at
from l4core.sampling.philox_host import philox_words

__all__ = ["draw_on_host"]

_SPAN = NOISE_MAX - NOISE_MIN + 0.0625
"""How far below the best a token can still win; the last term covers the rounding of a sum of size 32."""
_FEW = 16
"""A set is small when it has at most 1 / _FEW of the vocabulary."""
_DEPTHS = (6.0, 3.0, 1.5, 0.75)
"""How deep below the best the first set of candidates reaches; the first depth with a small set is taken, else the last."""

Floats = npt.NDArray[np.float32]


def draw_on_host(distance: torch.Tensor, seeds: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """distance: float32 [R, V] on the CPU, (logits − best) / T. Returns int64 [R]."""
    tokens = torch.zeros(len(seeds), dtype=torch.int64)
    few: list[int] = []
    near: list[npt.NDArray[np.intp]] = []
    for i, row in enumerate(distance.numpy()):
        candidates = row >= -_SPAN
        if np.count_nonzero(candidates) * _FEW <= len(row):
            few.append(i)
            near.append(np.flatnonzero(candidates))
        else:
            tokens[i] = _draw_among_many(row, seeds[i], positions[i])
    if few:
        tokens[few] = _draw_among_few(distance[few], near, [seeds[i] for i in few], [positions[i] for i in few])
    return tokens


def _draw_among_few(
    distance: torch.Tensor, near: Sequence[npt.NDArray[np.intp]], seeds: Sequence[int], positions: Sequence[int]
) -> torch.Tensor:
    """near[r]: ascending ids of row r that can win."""
    width = max(1, *(len(ids) for ids in near))
    ids = np.zeros((len(near), width), dtype=np.int64)
    absent = np.ones_like(ids, dtype=np.bool_)
    for r, row_ids in enumerate(near):
        ids[r, : len(row_ids)] = row_ids
        absent[r, : len(row_ids)] = False
    id_tensor = torch.from_numpy(ids)
    noise = gumbel_noise_at(seed_tensor(seeds, "cpu"), torch.tensor(list(positions), dtype=torch.int64), id_tensor)
    scores = noise.add_(distance.gather(1, id_tensor)).masked_fill_(torch.from_numpy(absent), -math.inf)
    return id_tensor.gather(1, torch.from_numpy(scores.numpy().argmax(axis=1))[:, None])[:, 0]


def _draw_among_many(distance: Floats, seed: int, position: int) -> int:
    words = philox_words(math.ceil(len(distance) / 4), position, seed).reshape(-1)[: len(distance)]
    depth = next((d for d in _DEPTHS if np.count_nonzero(distance >= -d) * _FEW <= len(distance)), _DEPTHS[-1])
    top = distance >= -depth
    top_ids = np.flatnonzero(top)
    in_hand = float(_scores(distance, words, top_ids).max())
    # A token outside `top` scores below g − depth, so it needs g above in_hand + depth.
    ids = np.flatnonzero(top | (words <= _largest_word_with(in_hand + depth)))
    return int(ids[_scores(distance, words, ids).argmax()])


def _scores(distance: Floats, words: npt.NDArray[np.uint32], ids: npt.NDArray[np.intp]) -> Floats:
    noise: Floats = gumbel_from_words(torch.from_numpy(words[ids].astype(np.int64))).numpy()
    noise += distance[ids]
    return noise


def _largest_word_with(noise: float) -> np.uint32:
    """No larger word has this much noise. u grows with the word and g falls with u; 1e-3 covers every rounding where g ≥ 0, below that all pass."""
    if noise < 0:
        return np.uint32(0xFFFFFFFF)
    u = -math.expm1(-math.exp(1e-3 - noise))
    return np.uint32(min(0xFFFFFFFF, math.ceil(u * 2.0**32)))
