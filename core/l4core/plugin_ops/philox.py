"""Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, SC'11) on int64 tensors: random words as a pure function of a counter and a key.

No state, no device generator: the same counter and key give the same words on every device. A 32-bit word lives in an int64 element,
because torch has no 32×32→64 multiply; products wrap modulo 2^64, which keeps both halves right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from l4core.plugin_ops.upload import upload

__all__ = ["key_words", "philox_4x32", "seed_tensor", "split_64"]

Words: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_ROUNDS = 10
_LOW = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


def philox_4x32(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """counter, key: int64 tensors that broadcast together, values in [0, 2^32). Returns four int64 tensors of the broadcast shape, values in
    [0, 2^32). Words that are constant along a dimension should come with size 1 there: the first rounds then cost less."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        # c1 and c3 keep rubbish in their high halves: they only meet xor, and the mask after it clears them.
        c0, c1 = ((p1 >> 32) ^ c1 ^ k0) & _LOW, p1
        c2, c3 = ((p0 >> 32) ^ c3 ^ k1) & _LOW, p0
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return c0, c1 & _LOW, c2, c3 & _LOW  # every word has met every input by now, so all have the full shape


def split_64(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(low 32 bits, high 32 bits) of int64 values read as unsigned, each an int64 tensor in [0, 2^32)."""
    return values & _LOW, (values >> 32) & _LOW


def key_words(seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The key of 64-bit seeds (int64, the bits count: −1 and 2^64 − 1 are one seed)."""
    return split_64(seeds)


def seed_tensor(seeds: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Seeds of any size, modulo 2^64, as int64 [len(seeds)] with the same 64 bits."""
    return upload([((s + 2**63) % 2**64) - 2**63 for s in seeds], torch.int64, device)
