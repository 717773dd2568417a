"""Experts on quantised weights in torch alone: each expert that is hit is made plain for the moment it is needed."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from l4core.ops.linear import linear
from l4core.ops.silu_mul import silu_mul
from l4core.plugin_api import ExpertContext, ExpertKernel, ExpertWeights
from l4core.quant import fp8, int4
from l4core.quant.formats import FP8


class TorchQuantisedExperts(ExpertKernel):
    """Right on every device torch knows, and what the kernels are held to. On an accelerator every expert is made plain, hit or not, since nothing is
    read back to the host."""

    def __init__(self, kept: str) -> None:
        self.format = kept

    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        assert weights.gate_up_scale is not None
        assert weights.down_scale is not None
        scaled = x * score.to(x.dtype).unsqueeze(1)
        out = torch.zeros_like(x)
        for expert in self._hit(expert_ids, weights.gate_up.shape[0]):
            mine = (expert_ids == expert).unsqueeze(1)
            rows = scaled[mine.squeeze(1)] if x.is_cpu else scaled
            made = self._mlp(
                rows,
                weights.gate_up[expert],
                weights.gate_up_scale[expert],
                weights.down[expert],
                weights.down_scale[expert],
            )
            out = out.masked_scatter_(mine, made) if x.is_cpu else torch.where(mine, made, out)
        if weights.shared_gate_up is None:
            return out
        assert weights.shared_down is not None
        assert weights.shared_gate_up_scale is not None
        assert weights.shared_down_scale is not None
        return out.add_(
            self._mlp(
                x,
                weights.shared_gate_up,
                weights.shared_gate_up_scale,
                weights.shared_down,
                weights.shared_down_scale,
            )
        )

    @staticmethod
    def _hit(expert_ids: torch.Tensor, num_experts: int) -> Iterable[int]:
        return sorted(set(expert_ids.tolist()) - {-1}) if expert_ids.is_cpu else range(num_experts)

    def _mlp(
        self,
        x: torch.Tensor,
        gate_up: torch.Tensor,
        gate_up_scale: torch.Tensor,
        down: torch.Tensor,
        down_scale: torch.Tensor,
    ) -> torch.Tensor:
        inner = silu_mul(linear(x, self._plain(gate_up, gate_up_scale, x.shape[1], x.dtype)))
        return linear(inner, self._plain(down, down_scale, inner.shape[1], x.dtype))

    def _plain(self, weight: torch.Tensor, scale: torch.Tensor, inputs: int, dtype: torch.dtype) -> torch.Tensor:
        if self.format == FP8:
            return fp8.dequantize(weight, scale, dtype)
        return int4.dequantize(weight, scale, inputs, dtype)


def create(context: ExpertContext) -> TorchQuantisedExperts:
    """The entry `torch_quantised`."""
    return TorchQuantisedExperts(context.requirements.weight_format)
