"""Matrix products with weights in checkpoint order [out, in]."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from l4core.ops.packed import SMALL_WEIGHT, packed_linear

THIN = {"AVX2": range(1, 65), "AVX512": range(9, 65)}.get(torch.backends.cpu.get_cpu_capability(), range(0))
"""Numbers of rows for which this processor's BLAS is faster on weight · xᵀ than on x · weightᵀ: up to three times, measured in
docs/decisions/001-cpu-experts.md."""
SAME_ORDER_ROWS = 4
"""From this many rows on BLAS adds the terms of a small product in one order, so that a request alone gets the bits it gets in a batch."""


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] · weight [N, K]ᵀ → [T, N]; written to `out` where given, else the result's memory order is free (it may be a transposed view)."""
    if weight.is_mkldnn:
        result = packed_linear(x, weight)
        return result if out is None else out.copy_(result)
    if x.shape[0] in THIN and _is_thin(x, weight):
        result = _one_row(x, weight) if x.shape[0] == 1 else _few_rows(x, weight)
        return result if out is None else out.copy_(result)
    if x.shape[0] < SAME_ORDER_ROWS and x.is_cpu and weight.numel() <= SMALL_WEIGHT:
        padded = x.expand(SAME_ORDER_ROWS, -1) if x.shape[0] == 1 else F.pad(x, (0, 0, 0, SAME_ORDER_ROWS - x.shape[0]))
        result = F.linear(padded, weight)[: x.shape[0]]
        return result if out is None else out.copy_(result)
    if out is None:
        return F.linear(x, weight)
    return torch.mm(x, weight.t(), out=out)


def _is_thin(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and weight.numel() > SMALL_WEIGHT and _num_threads() > 1


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
