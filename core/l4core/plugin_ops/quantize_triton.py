"""`quantize_q` as one Triton kernel: a strided read, a saturating round, a contiguous write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["quantize_q_triton"]

BLOCK = 1024


@triton.jit
def _quantize(
    q,
    descale,
    out,
    row_stride,
    head_stride,
    row_size,
    head_dim: tl.constexpr,
    largest: tl.constexpr,
    has_descale: tl.constexpr,
    block: tl.constexpr,
):
    """Program (row, part): `block` elements of one row of queries."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < row_size
    x = tl.load(q + row * row_stride + (at // head_dim) * head_stride + at % head_dim, mask=inside).to(tl.float32)
    if has_descale:
        x = x / tl.load(descale)
    x = tl.minimum(x, largest, propagate_nan=tl.PropagateNan.ALL)
    x = tl.maximum(x, -largest, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * row_size + at, x.to(out.dtype.element_ty), mask=inside)


def quantize_q_triton(q: torch.Tensor, dtype: torch.dtype, descale: torch.Tensor | None) -> torch.Tensor:
    """q: [T, H, D] on a Triton device, last stride 1."""
    num_tokens, num_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    if num_tokens == 0:
        return out
    row_size = num_heads * head_dim
    grid = (num_tokens, triton.cdiv(row_size, BLOCK))
    _quantize[grid](
        q,
        descale if descale is not None else q,
        out,
        q.stride(0),
        q.stride(1),
        row_size,
        head_dim=head_dim,
        largest=torch.finfo(dtype).max,
        has_descale=descale is not None,
        block=BLOCK,
    )
    return out
