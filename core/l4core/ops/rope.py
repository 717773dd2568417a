"""Rotary position embedding on interleaved pairs, the order Llama 4 checkpoints store q and k in."""

from __future__ import annotations

import torch


def rope_(qk: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (2i, 2i+1) of qk [T, heads, D] by the angles of cos_sin [T, 1, D/2, 2], in place; low precision is turned in float32."""
    if qk.device.type == "cpu":
        _turn_as_complex(qk, cos_sin)
    else:
        _turn_as_pairs(qk, cos_sin)
    return qk


def _turn_as_complex(qk: torch.Tensor, cos_sin: torch.Tensor) -> None:
    wide = qk.to(cos_sin.dtype)  # qk itself when it has that dtype
    torch.view_as_complex(wide.view(*wide.shape[:-1], -1, 2)).mul_(torch.view_as_complex(cos_sin))
    if wide is not qk:
        qk.copy_(wide)


def _turn_as_pairs(qk: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """Without complex numbers, which not every device has."""
    even, odd = qk[..., 0::2], qk[..., 1::2]  # [T, heads, D/2]
    cos, sin = cos_sin[..., 0], cos_sin[..., 1]  # [T, 1, D/2]
    a, b = even.to(cos.dtype), odd.to(cos.dtype)
    turned_even, turned_odd = a * cos - b * sin, a * sin + b * cos
    even.copy_(turned_even)
    odd.copy_(turned_odd)
