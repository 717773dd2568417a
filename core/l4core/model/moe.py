"""Mixture of experts with one expert a token: a router, the expert it chose, and a shared expert that every token visits."""

from __future__ import annotations

import torch
from torch import nn

from l4core.experts.packed import PackedExperts
from l4core.experts.portable import TorchExperts
from l4core.model.config import ModelConfig
from l4core.model.layers import Linear, SwiGLU, parameter
from l4core.ops.packed import can_pack
from l4core.ops.router import route
from l4core.plugin_api import ExpertKernel, ExpertWeights


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
    nonlinear, s on its output would be another function.

    kernel: computes everything after the router; chosen once for the model (experts.select), torch's where none is given."""

    def __init__(self, config: ModelConfig, kernel: ExpertKernel | None = None) -> None:
        super().__init__()
        self.router = Linear(config.num_experts, config.hidden_size)
        self.shared = SwiGLU(config.hidden_size, config.intermediate_size)
        self.experts = Experts(config)
        self.kernel = kernel or TorchExperts()
        self.packed: PackedExperts | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] → [T, H]; the result may be a transposed view."""
        expert_ids, score = route(x, self.router.weight)
        if self.packed is not None:
            return self.packed(x, expert_ids, score)
        return self.kernel.forward(x, expert_ids, score, self.weights())

    def pack(self) -> None:
        """Torch's experts on a CPU, loaded before: their weights go into the order a CPU reads fastest, and the plain ones are let go."""
        if self.packed is None and isinstance(self.kernel, TorchExperts) and can_pack(self.experts.down[0]):
            self.shared.gate_up.pack()
            self.shared.down.pack()
            self.packed = PackedExperts(self.weights())
            del self.experts

    def weights(self) -> ExpertWeights:
        """This layer's weights as kernels read them; made at each call because a parameter may be moved."""
        return ExpertWeights(
            gate_up=self.experts.gate_up.transpose(1, 2),
            down=self.experts.down.transpose(1, 2),
            shared_gate_up=self.shared.gate_up.weight,
            shared_down=self.shared.down.weight,
        )
