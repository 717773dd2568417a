"""Matrix products with weights in checkpoint order [out, in]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

FEW_ROWS = 64
"""Up to this many rows a CPU product is bound by reading the weight once."""
SMALL_WEIGHT = 1 << 16
"""Elements of a weight below which one plain call is cheapest."""
THIN_BLAS_IS_SLOW = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""On AVX2 the BLAS gives a product of few rows to one thread and half the bandwidth; on AVX512 the plain call is best. Both were measured:
docs/decisions/001-cpu-experts.md."""


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] · weight [N, K]ᵀ → [T, N]; written to `out` where given, else the result's memory order is free (it may be a transposed view)."""
    if _is_thin(x, weight):
        result = _one_row(x, weight) if x.shape[0] == 1 else _few_rows(x, weight)
        return result if out is None else out.copy_(result)
    if out is None:
        return F.linear(x, weight)
    return torch.mm(x, weight.t(), out=out)


def _is_thin(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if not THIN_BLAS_IS_SLOW or x.device.type != "cpu" or x.shape[0] > FEW_ROWS or weight.numel() < SMALL_WEIGHT:
        return False
    return x.dtype == torch.float32 and torch.get_num_threads() > 1


def _few_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight · xᵀ: the long side is the one that is dealt to the threads."""
    return torch.mm(weight, x.contiguous().t()).t()


def _one_row(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Output rows dealt to the threads as a batch: BLAS leaves a matrix-vector product to one thread."""
    num_out, num_in = weight.shape
    parts = math.gcd(num_out, 2 * torch.get_num_threads())
    columns = x.t().expand(parts, num_in, 1)  # as a transposed view: BLAS is several times slower on a column of stride 1
    return torch.bmm(weight.view(parts, num_out // parts, num_in), columns).view(1, num_out)
