"""The gate of SwiGLU in one launch: a program a token and a block of columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from l4core.ops.overlap_triton import launch_options, let_next_start, wait_for_last

BLOCK = 1024


def silu_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """See `silu_mul.silu_mul`."""
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, size)
    if num_tokens > 0:
        grid = (num_tokens, triton.cdiv(size, BLOCK))
        _silu_mul_kernel[grid](
            gate_up, out, gate_up.stride(0), size, BLOCK=BLOCK, num_warps=4, **launch_options(gate_up)
        )
    return out


@triton.jit
def _silu_mul_kernel(gate_up, out, stride_token, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        let_next_start()
        wait_for_last()
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + token * stride_token + at, mask=inside).to(tl.float32)
    up = tl.load(gate_up + token * stride_token + size + at, mask=inside).to(tl.float32)
    tl.store(out + token * size + at, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)
