"""The router: one expert for each token, and how strongly it is taken."""

from __future__ import annotations

import torch

from l4core.ops.device import has_kernels
from l4core.ops.linear import linear


def route(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H], weight [E, H] → (expert_ids int32 [T], score [T]). The expert is the arg-max of x · weightᵀ, the lowest where several tie; the
    score is the sigmoid of that logit, in float32 (float64 for float64). T ≥ 1."""
    if has_kernels(x):
        from l4core.ops.router_triton import route_triton

        return route_triton(x, weight)
    return route_torch(x, weight)


def route_torch(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch: the definition the kernel is held to."""
    best, expert_ids = linear(x, weight).max(dim=-1)
    return expert_ids.int(), best.to(torch.promote_types(best.dtype, torch.float32)).sigmoid()
