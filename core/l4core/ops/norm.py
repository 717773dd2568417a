"""RMS norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from l4core.ops.device import has_kernels

HALF = (torch.bfloat16, torch.float16)


def add_rms_norm(
    stream: torch.Tensor,
    update: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """Adds `update` (None = nothing) to the residual stream [T, H] in place and returns the sum's RMS norm · weight [H]; one kernel on a GPU.
    kept: [T, H], rows may lie apart; receives the sum too."""
    if has_kernels(stream):
        from l4core.ops.norm_triton import add_rms_norm_triton

        return add_rms_norm_triton(stream, update, weight, eps, kept)
    return add_rms_norm_torch(stream, update, weight, eps, kept)


def add_rms_norm_torch(
    stream: torch.Tensor,
    update: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch: the definition the kernel is held to."""
    if update is not None:
        stream.add_(update)
    if kept is not None:
        kept.copy_(stream)
    return rms_norm(stream, weight, eps)


def pair_norm(
    a: torch.Tensor, b: torch.Tensor, weight_a: torch.Tensor, weight_b: torch.Tensor, eps: float
) -> torch.Tensor:
    """a, b [T, H] → their RMS norms · weights side by side, [T, 2H]; one kernel on a GPU."""
    if has_kernels(a):
        from l4core.ops.pair_norm_triton import pair_norm_triton

        return pair_norm_triton(a, b, weight_a, weight_b, eps)
    return pair_norm_torch(a, b, weight_a, weight_b, eps)


def pair_norm_torch(
    a: torch.Tensor, b: torch.Tensor, weight_a: torch.Tensor, weight_b: torch.Tensor, eps: float
) -> torch.Tensor:
    """The same in plain torch: the definition the kernel is held to."""
    return torch.cat((rms_norm(a, weight_a, eps), rms_norm(b, weight_b, eps)), dim=-1)


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
