"""RMS norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F

HALF = (torch.bfloat16, torch.float16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H] / rms(x) · weight [H], the mean taken in float32 or wider."""
    if x.dtype in HALF:
        return F.rms_norm(x, weight.shape, weight, eps)
    return x.mul(_inverse_rms(x, eps)).mul_(weight)


def qk_norm_(qk: torch.Tensor, eps: float) -> torch.Tensor:
    """Divides every head of qk [T, heads, D] by its rms, in place, without a weight; low precision is normed in float32."""
    return qk.mul_(_inverse_rms(qk.float() if qk.dtype in HALF else qk, eps))


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / rms of the last dimension, [..., 1]; one pass over x and no copy of it."""
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
