"""The law on a CPU without most of its work: tokens that cannot win are never given noise. Same tokens as `draw.draw_by_law`, bit for bit.

Noise lies between NOISE_MIN and NOISE_MAX, so a token further than their difference below the best cannot win. Where few are nearer, only those
get noise (the usual case after top-p). Otherwise all Philox words are made, but only those small enough to beat a score in hand get logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from l4core.plugin_ops.masks_host import scale
from l4core.sampling.noise import NOISE_MAX, NOISE_MIN, gumbel_from_words
from l4core.sampling.philox_host import philox_words
from l4core.sampling.records import DrawKey

__all__ = ["draw_on_host"]

_SPAN = NOISE_MAX - NOISE_MIN + 0.0625
"""How far below the best a token can still win; the last term covers the rounding of a sum of size 32."""
_FEW, _ALWAYS_FEW = 16, 4096
"""A set is few when it has at most 1 / _FEW of the vocabulary, or this many: below that the cost is that of the calls."""
_DEPTHS = (6.0, 3.0, 1.5, 0.75)
"""How deep below the best the first set of candidates reaches: the first depth with a small set is taken, else the last."""
_MODULUS = 2**64
_SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)

Floats: TypeAlias = npt.NDArray[np.float32]
Words: TypeAlias = npt.NDArray[np.uint32]
Ids: TypeAlias = npt.NDArray[np.intp]


def draw_on_host(rows: Sequence[Floats], keys: Sequence[DrawKey]) -> torch.Tensor:
    """rows: logits, float32 [V] each, all with T > 0. Returns int64 [R]."""
    tokens = [0] * len(rows)
    few: list[int] = []
    near: list[tuple[Ids, Floats]] = []
    for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
        distance = scale(row, max(key.temperature, _SMALLEST_TEMPERATURE))
        candidates = distance >= -_SPAN
        if _is_few(candidates):
            ids = np.flatnonzero(candidates)
            few.append(i)
            near.append((ids, distance[ids]))
        else:
            tokens[i] = _draw_among_many(distance, key)
    for i, token in zip(few, _draw_among_few(near, [keys[i] for i in few]), strict=True):
        tokens[i] = token
    return torch.tensor(tokens, dtype=torch.int64)


def _is_few(members: npt.NDArray[np.bool_]) -> bool:
    return int(np.count_nonzero(members)) <= max(len(members) // _FEW, _ALWAYS_FEW)


def _draw_among_few(near: Sequence[tuple[Ids, Floats]], keys: Sequence[DrawKey]) -> list[int]:
    """near: for each row the ascending ids that can win, and their distances (none when the row holds NaN). One Philox run for all rows."""
    if not near:
        return []
    sizes = [len(ids) for ids, _ in near]
    ids = np.concatenate([ids for ids, _ in near]).astype(np.uint64)
    positions = np.repeat(np.array([key.position for key in keys], dtype=np.uint64), sizes)
    seeds = np.repeat(np.array([key.seed % _MODULUS for key in keys], dtype=np.uint64), sizes)
    words = philox_words(ids >> np.uint64(2), positions, seeds)[np.arange(len(ids)), ids & np.uint64(3)]
    noise = _noise(words)
    tokens, start = [], 0
    for row_ids, distance in near:
        scores = noise[start : start + len(row_ids)] + distance
        start += len(row_ids)
        tokens.append(int(row_ids[scores.argmax()]) if len(row_ids) else 0)
    return tokens


def _draw_among_many(distance: Floats, key: DrawKey) -> int:
    blocks = np.arange(math.ceil(len(distance) / 4), dtype=np.uint64)
    position, seed = np.array([key.position], dtype=np.uint64), np.array([key.seed % _MODULUS], dtype=np.uint64)
    words = philox_words(blocks, position, seed).reshape(-1)[: len(distance)]
    depth = next((d for d in _DEPTHS if _is_few(distance >= -d)), _DEPTHS[-1])
    top = distance >= -depth
    top_ids = np.flatnonzero(top)
    in_hand = float((_noise(words[top_ids]) + distance[top_ids]).max())
    # A token outside `top` scores below g − depth, so it needs g above in_hand + depth.
    ids = np.flatnonzero(top | (words <= _largest_word_with(in_hand + depth)))
    return int(ids[(_noise(words[ids]) + distance[ids]).argmax()])


def _noise(words: Words) -> Floats:
    noise: Floats = gumbel_from_words(torch.from_numpy(words.astype(np.int64))).numpy()
    return noise


def _largest_word_with(noise: float) -> np.uint32:
    """No larger word has this much noise. u grows with the word and g falls with u; 1e-3 covers every rounding where g ≥ 0, below that all pass."""
    if noise < 0:
        return np.uint32(0xFFFFFFFF)
    u = -math.expm1(-math.exp(1e-3 - noise))
    return np.uint32(min(0xFFFFFFFF, math.ceil(u * 2.0**32)))
