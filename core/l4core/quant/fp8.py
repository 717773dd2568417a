"""fp8_channel: e4m3 weights with a float32 scale for each output, as in compressed-tensors' FP8 checkpoints.

Checkpoints with one scale a tensor (ModelOpt) are the same with equal scales. Activations are rounded to e4m3 where a kernel multiplies bytes,
with a scale a row taken from the row itself; scales of activations that a checkpoint brings along are not used, since a row's own is never worse.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from l4core.ops.quantise_rows import quantise_rows_torch


def quantize(weight: torch.Tensor, largest: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [..., N, K] → (e4m3 [..., N, K], scale float32 [..., N, 1]); weight ≈ e4m3 · scale. largest [..., N, 1]: of the absolute values of a
    row, where `weight` is a part of it."""
    return quantise_rows_torch(weight, largest)


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """e4m3 [..., N, K], scale [..., N, 1] → [..., N, K] of `dtype`, multiplied in float32."""
    return (weight.float() * scale).to(dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [T, K] · Wᵀ → [T, N] in x's dtype, the weight as it is and x unrounded: the definition."""
    return F.linear(x, dequantize(weight, scale, x.dtype))
