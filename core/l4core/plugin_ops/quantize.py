"""Queries as fp8, for kernels that want them in the type of an fp8 KV cache."""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["quantize_q"]


def quantize_q(
    q: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, descale: torch.Tensor | None = None
) -> torch.Tensor:
    """q / descale, rounded to `dtype` and saturated at its largest value (torch's own cast does not on every device); NaN stays NaN.

    q: [T, num_q_heads, head_dim], float, may be a strided slice.  descale: float32 scalar on q's device that the kernel multiplies back; None = 1.
    Returns [T, num_q_heads, head_dim] in `dtype`, contiguous. Device work, no sync.

    The scale is one number for all rows and not a maximum over them: a row must not depend on its neighbours, or a token would change with the
    batch, the prefill piece or a cache hit it happens to be computed in. e4m3 has 448 as its largest and 2^-6 as its smallest normal value, so with
    scale 1 queries of any usual size keep its full 3 bits of mantissa.
    """
    if dtype.itemsize != 1 or not dtype.is_floating_point:
        raise ValueError(f"queries are to become {dtype}; wanted an 8-bit float")
    if q.device.type == "cuda" and q.stride(-1) == 1 and importlib.util.find_spec("triton") is not None:
        from l4core.plugin_ops.quantize_triton import quantize_q_triton

        return quantize_q_triton(q, dtype, descale)
    return quantize_q_torch(q, dtype, descale)


def quantize_q_torch(q: torch.Tensor, dtype: torch.dtype, descale: torch.Tensor | None) -> torch.Tensor:
    """The same in plain torch: the definition the kernel is held to."""
    largest = torch.finfo(dtype).max
    scaled = q.float() if descale is None else q.float() / descale
    return scaled.clamp(-largest, largest).to(dtype).contiguous()
