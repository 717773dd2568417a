"""Residual add and RMS norm in one launch: a program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from l4core.ops.overlap_triton import launch_options, let_next_start, wait_for_last


def add_rms_norm_triton(
    stream: torch.Tensor,
    update: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `norm.add_rms_norm`. Rows of `stream`, `update` and `kept` may lie apart; inside a row elements are neighbours."""
    num_tokens, size = stream.shape
    if update is not None and update.stride(1) != 1:
        update = update.contiguous()
    out = torch.empty_like(stream, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(size)
    if num_tokens > 0:
        _add_norm_kernel[(num_tokens,)](
            stream,
            update,
            weight,
            out,
            kept,
            stream.stride(0),
            0 if update is None else update.stride(0),
            0 if kept is None else kept.stride(0),
            size,
            eps,
            BLOCK=block,
            num_warps=min(max(block // 1024, 1), 16),
            **launch_options(stream),
        )
    return out


@triton.jit
def _add_norm_kernel(
    stream,
    update,
    weight,
    out,
    kept,
    stride_stream,
    stride_update,
    stride_kept,
    size,
    eps,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        let_next_start()
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        wait_for_last()
    x = tl.load(stream + token * stride_stream + at, mask=inside, other=0.0)
    if update is not None:
        more = tl.load(update + token * stride_update + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)  # what is normed is what the stream keeps
        tl.store(stream + token * stride_stream + at, x, mask=inside)
    if kept is not None:
        tl.store(kept + token * stride_kept + at, x, mask=inside)
    x = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    tl.store(out + token * size + at, (x * inverse * scale).to(out.dtype.element_ty), mask=inside)
