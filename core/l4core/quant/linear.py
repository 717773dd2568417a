"""Products with quantised weights: torch's definition on a CPU, kernels where Triton runs."""

from __future__ import annotations

import math

import torch

from l4core.ops.device import has_kernels
from l4core.ops.quantise_rows import quantise_rows
from l4core.quant import fp8, int4

FEW_ROWS = 64
"""Up to this many rows memory is the limit: rows stay as they are. From there on they are quantised and bytes are multiplied."""


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [T, K], weight e4m3 [N, K], scale float32 [N, 1] → [T, N] in x's dtype."""
    if not has_kernels(x):
        return fp8.linear(x, weight, scale)
    if x.shape[0] > FEW_ROWS and x.dtype == torch.bfloat16:
        rows, row_scale = quantise_rows(x)
        made: torch.Tensor = torch._scaled_mm(
            rows, weight.t(), scale_a=row_scale, scale_b=scale.t(), out_dtype=x.dtype, use_fast_accum=True
        )
        return made
    return _fp8_few(x, weight, scale)


def _fp8_few(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    import triton

    from l4core.ops.dots_triton import dot_type, unpacks_inline
    from l4core.ops.expert_rows_triton import ALL
    from l4core.ops.experts_fp8_triton import fp8_down
    from l4core.ops.overlap_triton import launch_options

    (num_rows, num_in), num_out = x.shape, weight.shape[0]
    rows = min(64, max(8, triton.next_power_of_2(num_rows)))
    columns, inputs = math.gcd(num_out, 64), 128
    parts = math.gcd(triton.cdiv(num_in, inputs), 8 if num_out <= 8192 else 4)
    blocks, tiles = num_out // columns, triton.cdiv(num_rows, rows)
    out = torch.empty(num_rows, num_out, dtype=x.dtype, device=x.device)
    sums = torch.empty(parts * num_rows * num_out if parts > 1 else 1, dtype=torch.float32, device=x.device)
    counters = torch.zeros(blocks * tiles, dtype=torch.int32, device=x.device)
    fp8_down[(blocks * tiles, parts)](
        x, sums, weight, scale, weight, scale, counters, counters, counters, out, sums, counters,
        num_rows, x.stride(0), blocks, num_in, num_out,
        MODE=ALL, E=0, SHARED=False, BLOCK_E=1, BLOCK_N=columns, BLOCK_T=rows, BLOCK_K=inputs, PARTS=parts,
        EVEN_K=num_in % inputs == 0, A8=False, ASM=unpacks_inline(x), DOT=dot_type(x),
        ADD=False, num_warps=4, num_stages=3, **launch_options(x) | {"enable_fp_fusion": True},
    )  # fmt: skip
    return out


def int4_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [T, K], packed int16 [⌈K/128⌉, N, 32], scale bfloat16 [⌈K/128⌉, N] → [T, N] in x's dtype.

    For a shared expert beside plain or FP8 experts, and the dense layers of a packed checkpoint; where experts are 4-bit too, their kernel does it.
    """
    if not has_kernels(x):
        return int4.linear(x, packed, scale)
    return _int4(x, packed, scale)


def _int4(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    import triton

    from l4core.ops.dots_triton import dot_type, unpacks_inline
    from l4core.ops.expert_rows_triton import ALL
    from l4core.ops.experts_int4_triton import HELD, int4_down
    from l4core.ops.overlap_triton import launch_options

    (num_rows, num_in), (groups, num_out, _) = x.shape, packed.shape
    few = num_rows <= FEW_ROWS
    rows = max(8, triton.next_power_of_2(num_rows)) if few else 128
    columns = math.gcd(num_out, 64 if few else 128)
    parts = math.gcd(groups, 4) if few else 1
    blocks, tiles = num_out // columns, triton.cdiv(num_rows, rows)
    out = torch.empty(num_rows, num_out, dtype=x.dtype, device=x.device)
    sums = torch.empty(parts * num_rows * num_out if parts > 1 else 1, dtype=torch.float32, device=x.device)
    counters = torch.zeros(blocks * tiles, dtype=torch.int32, device=x.device)
    int4_down[(blocks * tiles, parts)](
        x, packed, scale, packed, scale, counters, counters, counters, out, sums, counters,
        num_rows, x.stride(0), blocks, num_in, num_out,
        MODE=ALL, E=0, SHARED=False, BLOCK_E=1, BLOCK_N=columns, BLOCK_T=rows, PARTS=parts, EVEN_K=num_in % 128 == 0,
        RATIO=rows >= 64, ASM=unpacks_inline(x), DOT=dot_type(x), ADD=False, FEW_GROUPS=groups // parts <= HELD.value and rows < 64, LATE=False,
        num_warps=4 if few else 8, num_stages=3, **launch_options(x) | {"enable_fp_fusion": True},
    )  # fmt: skip
    return out
