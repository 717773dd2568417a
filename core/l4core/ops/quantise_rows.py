"""Rows of numbers to e4m3, each row with a scale of its own: weights by output, activations by token."""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
TINY = 1e-12


def quantise_rows_torch(x: torch.Tensor, largest: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] → (e4m3 [..., K], scale float32 [..., 1]); x ≈ e4m3 · scale, the largest of a row becomes 448. The definition.
    largest [..., 1]: that value, where x is a part of its row."""
    scale = (x.abs().amax(-1, keepdim=True) if largest is None else largest).float().clamp_(min=TINY) / E4M3_MAX
    return (x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations x [T, K], rows contiguous → (e4m3 [T, K], scale float32 [T, 1]). On a device with Triton one launch; on a CPU torch, since
    the interpreter's rounding to e4m3 is wrong where it carries into the exponent."""
    if x.is_cpu:
        return quantise_rows_torch(x)
    import triton

    from l4core.ops.experts_fp8_triton import quantise_rows_kernel

    num_rows, size = x.shape
    out = torch.empty(num_rows, size, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(num_rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    quantise_rows_kernel[(num_rows,)](
        x, out, scale, size, x.stride(0), largest=E4M3_MAX, BLOCK=block, num_warps=max(1, min(16, block // 512))
    )
    return out, scale
