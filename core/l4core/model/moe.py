"""Mixture of experts with one expert a token: a router, the expert it chose, and a shared expert that every token visits."""

from __future__ import annotations

import torch
from torch import nn

from l4core.model.config import ModelConfig
from l4core.model.layers import Linear, SwiGLU, parameter
from l4core.ops.grouped import group_rows, grouped_linear
from l4core.ops.silu_mul import silu_mul


class Experts(nn.Module):
    """The routed experts. Shapes are the checkpoint's, in by out; in memory each expert lies out by in, the order in which a product of few
    rows, and any product in bfloat16 on a CPU, reads a weight fastest."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num_experts, hidden, inter = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_up = parameter(num_experts, hidden, 2 * inter, transposed=True)  # gate columns first
        self.down = parameter(num_experts, inter, hidden, transposed=True)


class MoE(nn.Module):
    """out = shared(x) + expert_e(s · x), e the arg-max of the router's logits, s = sigmoid of that logit in float32. Because the expert is
    nonlinear, s on its output would be another function."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Linear(config.num_experts, config.hidden_size)
        self.shared = SwiGLU(config.hidden_size, config.intermediate_size)
        self.experts = Experts(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] → [T, H]; the result may be a transposed view."""
        best, expert_ids = self.router(x).max(dim=-1)  # [T], [T]
        score = best.to(torch.promote_types(best.dtype, torch.float32)).sigmoid().to(x.dtype)  # [T]
        groups = group_rows(expert_ids, self.router.weight.shape[0])
        routed = groups.pack(x * score.unsqueeze(1))  # [T, H]
        routed = silu_mul(grouped_linear(routed, self.experts.gate_up, groups))  # [T, I]
        routed = grouped_linear(routed, self.experts.down, groups)  # [T, H]
        out: torch.Tensor = self.shared(x)
        return out.add_(groups.unpack(routed))
