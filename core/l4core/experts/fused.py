"""Experts in Triton: one path for few tokens, bound by reading weights, one for many, bound by arithmetic. Chosen by the number of tokens alone."""

from __future__ import annotations

import torch

from l4core.errors import BackendUnavailable
from l4core.experts.few_triton import few_tokens
from l4core.experts.one_triton import one_token
from l4core.experts.sorted_triton import routed_experts
from l4core.experts.tiles import Row, Tiles, tiles_for
from l4core.ops.linear import linear
from l4core.ops.silu_mul import silu_mul
from l4core.plugin_api import ExpertContext, ExpertKernel, ExpertWeights


class TritonExperts(ExpertKernel):
    """Plain weights of bfloat16, float16 or float32 (IEEE products). Reads nothing back to the host, so it may be captured."""

    without_memory = True

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles

    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        row = self.tiles.row(x.shape[0])
        if row.gate_up.rows == 1:
            return one_token(x, expert_ids, score, weights, row.gate_up, row.down)
        if row.few:
            return few_tokens(x, expert_ids, score, weights, row.gate_up, row.down)
        out = self._shared(x, weights, row)
        return routed_experts(x, expert_ids, score, weights, out, row.gate_up, row.down)

    @staticmethod
    def _shared(x: torch.Tensor, weights: ExpertWeights, row: Row) -> torch.Tensor | None:
        """The shared expert for many tokens: BLAS, but in float32, where it would add in an order that depends on their number, as one expert that
        everybody has. Both paths then give a token the same bits, alone or in any batch."""
        if weights.shared_gate_up is None:
            return None
        assert weights.shared_down is not None
        if x.dtype != torch.float32:
            return linear(silu_mul(linear(x, weights.shared_gate_up)), weights.shared_down).contiguous()
        everybody = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
        alone = ExpertWeights(gate_up=weights.shared_gate_up.unsqueeze(0), down=weights.shared_down.unsqueeze(0))
        return routed_experts(x, everybody, torch.ones_like(x[:, 0]), alone, None, row.gate_up, row.down)


def create(context: ExpertContext) -> TritonExperts:
    """The entry `triton`."""
    req, platform = context.requirements, context.platform
    if platform.device_type == "cpu":
        raise BackendUnavailable("Triton's kernels run on an accelerator", fix="--expert-kernel torch")
    return TritonExperts(tiles_for(platform.arch, req.num_experts, req.hidden_size, req.intermediate_size, req.dtype))
