"""RMS norms of two rows side by side, in one launch: a program a token and half."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from l4core.ops.overlap_triton import launch_options, let_next_start, wait_for_last


def pair_norm_triton(
    a: torch.Tensor, b: torch.Tensor, weight_a: torch.Tensor, weight_b: torch.Tensor, eps: float
) -> torch.Tensor:
    """See `norm.pair_norm`. Rows may lie apart; inside a row elements are neighbours."""
    num_tokens, size = a.shape
    out = a.new_empty(num_tokens, 2 * size)
    block = triton.next_power_of_2(size)
    if num_tokens > 0:
        _pair_norm_kernel[(num_tokens, 2)](
            a,
            b,
            weight_a,
            weight_b,
            out,
            a.stride(0),
            b.stride(0),
            size,
            eps,
            BLOCK=block,
            num_warps=min(max(block // 1024, 1), 16),
            **launch_options(a),
        )
    return out


@triton.jit
def _pair_norm_kernel(
    a, b, weight_a, weight_b, out, stride_a, stride_b, size, eps, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        let_next_start()
    token, half = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < size
    if half == 0:
        source, weight = a + token * stride_a, weight_a
    else:
        source, weight = b + token * stride_b, weight_b
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        wait_for_last()
    x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    place = out + (2 * token + half) * size + at
    tl.store(place, (x * inverse * scale).to(out.dtype.element_ty), mask=inside)
