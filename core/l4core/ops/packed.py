"""A CPU's weights in the order oneDNN's kernels read them, packed once after loading: for few rows and for many about twice as fast as a plain
product, which packs the weight anew at each call. Measured in docs/decisions/015-ops.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

PACKED_DTYPES = (torch.float32, torch.bfloat16)
ROWS_HINT = 64
"""The layout chosen for this many rows is the one that oneDNN wants for any number."""
LEAST_ROWS = 4
"""Fewer rows than this take longer than this many do."""
SMALL_WEIGHT = 1 << 17
"""Elements up to which a weight stays in the cache, and one plain call is cheap."""


def can_pack(weight: torch.Tensor) -> bool:
    """weight: [N, K]."""
    return (
        weight.is_cpu
        and weight.layout == torch.strided
        and weight.dtype in PACKED_DTYPES
        and weight.numel() > SMALL_WEIGHT
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512", "AMX")
        and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack(weight: torch.Tensor) -> torch.Tensor:
    """weight [N, K] → a copy of the same shape whose elements only `packed_linear` can read."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)
    return packed


def packed_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K] · weight [N, K]ᵀ → [T, N]."""
    num_rows = x.shape[0]
    if num_rows < LEAST_ROWS:
        x = x.expand(LEAST_ROWS, -1) if num_rows == 1 else F.pad(x, (0, 0, 0, LEAST_ROWS - num_rows))
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out if num_rows >= LEAST_ROWS else out[:num_rows]
