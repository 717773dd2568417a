"""Matrix products with weights in checkpoint order [out, in]."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from l4core.ops.device import has_kernels
from l4core.ops.packed import SMALL_WEIGHT, packed_linear

THIN = {"AVX2": range(1, 65), "AVX512": range(9, 65)}.get(torch.backends.cpu.get_cpu_capability(), range(0))
"""Numbers of rows for which this processor's BLAS is faster on weight · xᵀ than on x · weightᵀ: up to three times, measured in
docs/decisions/001-cpu-experts.md."""
FEW_ROWS, LARGE_WEIGHT, LARGE_FOR_ONE = 32, 1 << 22, 1 << 21
"""Up to so many rows, and from so many elements on (for a single row fewer), a product on a GPU is nothing but reading the weight."""
HALF = (torch.bfloat16, torch.float16)
SAME_ORDER_ROWS = 4
"""From this many rows on BLAS adds the terms of a small product in one order, so that a request alone gets the bits it gets in a batch."""


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] · weight [N, K]ᵀ → [T, N]; written to `out` where given, else the result's memory order is free (it may be a transposed view)."""
    if not x.is_cpu:
        return _on_device(x, weight, out)
    if weight.is_mkldnn:
        result = packed_linear(x, weight)
        return result if out is None else out.copy_(result)
    if x.shape[0] in THIN and _is_thin(x, weight):
        result = _one_row(x, weight) if x.shape[0] == 1 else _few_rows(x, weight)
        return result if out is None else out.copy_(result)
    if x.shape[0] < SAME_ORDER_ROWS and weight.numel() <= SMALL_WEIGHT:
        padded = x.expand(SAME_ORDER_ROWS, -1) if x.shape[0] == 1 else F.pad(x, (0, 0, 0, SAME_ORDER_ROWS - x.shape[0]))
        result = F.linear(padded, weight)[: x.shape[0]]
        return result if out is None else out.copy_(result)
    if out is None:
        return F.linear(x, weight)
    return torch.mm(x, weight.t(), out=out)


def _on_device(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """torch's product, or for few rows and a large weight in low precision one that only reads the weight (docs/decisions/015-ops.md)."""
    if (
        x.is_cuda
        and x.shape[0] <= FEW_ROWS
        and weight.dtype in HALF
        and weight.numel() >= (LARGE_FOR_ONE if x.shape[0] == 1 else LARGE_WEIGHT)
        and has_kernels(x)
    ):
        from l4core.ops.skinny_triton import gains, skinny_linear, tile_for

        tile = tile_for(x.shape[0], x.shape[1]) if gains(x.device) else None
        if tile is not None and x.stride(1) == weight.stride(1) == 1:
            return skinny_linear(x, weight, x.new_empty(x.shape[0], weight.shape[0]) if out is None else out, tile)
    return F.linear(x, weight) if out is None else torch.mm(x, weight.t(), out=out)


def _is_thin(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and weight.numel() > SMALL_WEIGHT and _num_threads() > 1


@functools.cache
def _num_threads() -> int:
    """Asking torch takes longer than a small product; threads are set before the first step."""
    return torch.get_num_threads()


def _few_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight · xᵀ: the long side is the one that is dealt to the threads."""
    return torch.mm(weight, x.contiguous().t()).t()


def _one_row(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Output rows dealt to the threads as a batch: BLAS leaves a matrix-vector product to one thread."""
    num_out, num_in = weight.shape
    parts = math.gcd(num_out, 2 * _num_threads())
    columns = x.as_strided(
        (parts, num_in, 1), (0, x.stride(1), num_in)
    )  # BLAS is several times slower on columns of stride 1
    return torch.bmm(weight.view(parts, num_out // parts, num_in), columns).view(1, num_out)
