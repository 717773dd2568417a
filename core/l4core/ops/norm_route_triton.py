"""Residual add, RMS norm and router in one launch, for few tokens: a program a token, which has the normed row at hand."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from l4core.ops.overlap_triton import launch_options, let_next_start, wait_for_last

PIECE = 1024
"""Inputs that are multiplied with all experts at a time."""


def norm_route_triton(
    stream: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float, router: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `norm_route.norm_route`. Logits are added in float32 and never rounded; a token's do not depend on how many there are."""
    num_tokens, size = stream.shape
    if update.stride(1) != 1:
        update = update.contiguous()
    out = torch.empty_like(stream, memory_format=torch.contiguous_format)
    expert_ids = torch.empty(num_tokens, dtype=torch.int32, device=stream.device)
    score = torch.empty(num_tokens, dtype=torch.float32, device=stream.device)
    _norm_route_kernel[(num_tokens,)](
        stream,
        update,
        weight,
        router,
        out,
        expert_ids,
        score,
        stream.stride(0),
        update.stride(0),
        eps,
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        PIECE=PIECE,
        E=router.shape[0],
        BLOCK_E=triton.next_power_of_2(router.shape[0]),
        num_warps=16,
        **launch_options(stream),
    )
    return out, expert_ids, score


@triton.jit
def _norm_route_kernel(
    stream,
    update,
    weight,
    router,
    out,
    expert_ids,
    score,
    stride_stream,
    stride_update,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        let_next_start()
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        wait_for_last()
    x = tl.load(stream + token * stride_stream + at, mask=inside, other=0.0)
    more = tl.load(update + token * stride_update + at, mask=inside, other=0.0)
    x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)  # what is normed is what the stream keeps
    tl.store(stream + token * stride_stream + at, x, mask=inside)
    x = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    normed = (x * inverse * scale).to(out.dtype.element_ty)
    tl.store(out + token * SIZE + at, normed, mask=inside)
    tl.debug_barrier()  # the row is read again below, by other threads

    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, PIECE)
    terms = tl.zeros([BLOCK_E, PIECE], tl.float32)
    for begin in tl.static_range(0, SIZE, PIECE):
        here = (begin + k < SIZE)[None, :] & (e < E)[:, None]
        weights = tl.load(router + e[:, None] * SIZE + begin + k[None, :], mask=here, other=0.0)
        inputs = tl.load(out + token * SIZE + begin + k, mask=begin + k < SIZE, other=0.0)
        terms += weights.to(tl.float32) * inputs.to(tl.float32)[None, :]
    logits = tl.where(e < E, tl.sum(terms, axis=1), float("-inf"))
    best, expert = tl.max(logits, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(expert_ids + token, expert)
    tl.store(score + token, tl.sigmoid(best))
