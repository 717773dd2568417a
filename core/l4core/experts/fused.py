"""Experts in Triton: one path for few tokens, bound by reading weights, one for many, bound by arithmetic. Chosen by the number of tokens alone."""

from __future__ import annotations

import torch

from l4core.errors import BackendUnavailable
from l4core.experts.few_triton import few_tokens
from l4core.experts.sorted_triton import routed_experts
from l4core.experts.tiles import Tiles, tiles_for
from l4core.ops.linear import linear
from l4core.ops.silu_mul import silu_mul
from l4core.plugin_api import ExpertContext, ExpertKernel, ExpertWeights


class TritonExperts(ExpertKernel):
    """Plain weights of bfloat16, float16 or float32 (IEEE products). Reads nothing back to the host, so it may be captured."""

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles

    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        row = self.tiles.row(x.shape[0])
        if row.few:
            return few_tokens(x, expert_ids, score, weights, row.gate_up, row.down)
        out = None
        if weights.shared_gate_up is not None:
            assert weights.shared_down is not None
            out = linear(silu_mul(linear(x, weights.shared_gate_up)), weights.shared_down).contiguous()
        return routed_experts(x, expert_ids, score, weights, out, row.gate_up, row.down)


def create(context: ExpertContext) -> TritonExperts:
    """The entry `triton`."""
    req, platform = context.requirements, context.platform
    if platform.device_type == "cpu":
        raise BackendUnavailable("Triton's kernels run on an accelerator", fix="--expert-kernel torch")
    return TritonExperts(tiles_for(platform.arch, req.num_experts, req.hidden_size, req.intermediate_size, req.dtype))
