"""RMS norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H] / rms(x) · weight [H], the mean taken in float32 or wider."""
    return F.rms_norm(x, weight.shape, weight, eps)


def qk_norm_(qk: torch.Tensor, eps: float) -> torch.Tensor:
    """Divides every head of qk [T, heads, D] by its rms, in place, without a weight; low precision is normed in float32."""
    wide = qk.float() if qk.dtype in (torch.bfloat16, torch.float16) else qk
    inverse_rms = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # [T, heads, 1]
    return qk.mul_(inverse_rms)
