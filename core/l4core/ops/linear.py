"""Matrix products with weights in checkpoint order [out, in]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

FEW_ROWS = 64
"""Up to this many rows a CPU product is bound by reading the weight once; measured in docs/decisions/001-cpu-experts.md."""


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] · weight [N, K]ᵀ → [T, N]; written to `out` where given, else the result's memory order is free (it may be a transposed view)."""
    if x.device.type == "cpu" and x.shape[0] <= FEW_ROWS:
        result = _few_rows(x, weight)
        return result if out is None else out.copy_(result)
    if out is None:
        return F.linear(x, weight)
    return torch.mm(x, weight.t(), out=out)


def _few_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same product as weight · xᵀ, its output rows dealt to the threads as a batch: BLAS alone leaves a thin product to one thread."""
    num_rows, (num_out, num_in) = x.shape[0], weight.shape
    parts = math.gcd(num_out, 2 * torch.get_num_threads())
    columns = x.contiguous().t().expand(parts, num_in, num_rows)  # [parts, K, T]
    product = torch.bmm(weight.view(parts, num_out // parts, num_in), columns)  # [parts, N/parts, T]
    return product.view(num_out, num_rows).t()
