"""The norm ahead of a mixture of experts, and its router."""

from __future__ import annotations

import torch

from l4core.ops.device import has_kernels
from l4core.ops.norm import HALF, add_rms_norm
from l4core.ops.router import route

FEW_TOKENS, FEW_EXPERTS = 128, 16
"""Up to so many one launch does both: each token reads the router's weight by itself, so many would read it too often, and a large one too slowly.
H200, 16 experts, in three launches and in one: 5.1 and 4.4 µs at one token, 6.3 and 4.7 at 64."""


def norm_route(
    stream: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float, router: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`add_rms_norm`, then `route` of its result → (normed [T, H], expert_ids int32 [T], score [T]). router: [E, H].

    Float32 always goes the separate ways, which add a token's terms in one order whatever the batch."""
    few = stream.shape[0] <= FEW_TOKENS and router.shape[0] <= FEW_EXPERTS
    if few and stream.dtype in HALF and has_kernels(stream):
        from l4core.ops.norm_route_triton import norm_route_triton

        return norm_route_triton(stream, update, weight, eps, router)
    normed = add_rms_norm(stream, update, weight, eps)
    return (normed, *route(normed, router))
