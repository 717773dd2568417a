"""Products with quantised weights: torch's definition, and the kernels where there are some."""

from __future__ import annotations

import torch

from l4core.quant import fp8, int4


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [T, K], weight e4m3 [N, K], scale float32 [N, 1] → [T, N] in x's dtype."""
    return fp8.linear(x, weight, scale)


def int4_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [T, K], packed int16 [⌈K/128⌉, N, 32], scale bfloat16 [⌈K/128⌉, N] → [T, N] in x's dtype."""
    return int4.linear(x, packed, scale)
