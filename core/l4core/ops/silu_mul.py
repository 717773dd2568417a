"""The gate of SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from l4core.ops.device import has_kernels


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2I], gate columns first → silu(gate) · up [T, I]."""
    if has_kernels(gate_up):
        from l4core.ops.silu_mul_triton import silu_mul_triton

        return silu_mul_triton(gate_up)
    return silu_mul_torch(gate_up)


def silu_mul_torch(gate_up: torch.Tensor) -> torch.Tensor:
    """The same in plain torch: the definition the kernel is held to."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
