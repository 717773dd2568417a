"""Experts in torch alone: right on every device torch knows, and what the other kernels are compared with."""

from __future__ import annotations

import torch

from l4core.ops.grouped import group_rows, grouped_linear
from l4core.ops.linear import linear
from l4core.ops.silu_mul import silu_mul
from l4core.plugin_api import ExpertContext, ExpertKernel, ExpertWeights


class TorchExperts(ExpertKernel):
    """Plain weights. On a CPU only the experts that are hit are read; on an accelerator nothing is read back to the host."""

    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        gate_up, down = weights.gate_up.transpose(1, 2), weights.down.transpose(1, 2)  # [E, H, 2I], [E, I, H]
        groups = group_rows(expert_ids, gate_up.shape[0])
        routed = groups.pack(x * score.to(x.dtype).unsqueeze(1))  # [T, H]
        routed = silu_mul(grouped_linear(routed, gate_up, groups))  # [T, I]
        routed = groups.unpack(grouped_linear(routed, down, groups))  # [T, H]
        if weights.shared_gate_up is None:
            return routed
        assert weights.shared_down is not None
        return linear(silu_mul(linear(x, weights.shared_gate_up)), weights.shared_down).add_(routed)


def create(context: ExpertContext) -> TorchExperts:
    """The entry `torch`."""
    return TorchExperts()
