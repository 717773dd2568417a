"""A random mixture of experts with quantised weights, and what it must give: the definition in float64 on the dequantised weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from l4core.plugin_api import ExpertKernel, ExpertWeights
from l4core.quant import fp8, int4
from l4core.quant.formats import FP8


@dataclass(frozen=True, kw_only=True)
class Problem:
    """x [T, H], ids int32 [T], score float32 [T].  expected: float64 [T, H]."""

    x: torch.Tensor
    ids: torch.Tensor
    score: torch.Tensor
    weights: ExpertWeights
    expected: torch.Tensor

    def error(self, kernel: ExpertKernel) -> float:
        """‖got − expected‖ / ‖expected‖."""
        out = kernel.forward(self.x, self.ids, self.score, self.weights)
        assert out.dtype == self.x.dtype
        assert out.shape == self.x.shape
        return float((out.double().cpu() - self.expected).norm() / self.expected.norm().clamp(min=1e-30))


def make(
    kept: str,
    ids: Sequence[int],
    num_experts: int,
    *,
    hidden: int = 128,
    inter: int = 64,
    dtype: torch.dtype = torch.float32,
    shared: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """kept: the format of all weights.  ids: −1 = an expert that another rank holds."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if kept == FP8:
            made, scale = fp8.quantize(weight)
            return made.to(device), scale.to(device), fp8.dequantize(made, scale).double()
        made, scale = int4.quantize(weight)
        return made.to(device), scale.to(device), int4.dequantize(made, scale, weight.shape[-1]).double()

    x, score = draw(len(ids), hidden).to(dtype), torch.rand(len(ids), generator=generator) * 0.9 + 0.05
    gate_up, gate_up_scale, plain_gate_up = quantise(draw(num_experts, 2 * inter, hidden) * hidden**-0.5)
    down, down_scale, plain_down = quantise(draw(num_experts, hidden, inter) * inter**-0.5)
    expected = torch.stack(
        [
            mlp(s * (e >= 0) * row.double(), plain_gate_up[e], plain_down[e])
            for row, e, s in zip(x, ids, score.double(), strict=True)
        ]
    )
    weights = ExpertWeights(gate_up=gate_up, down=down, gate_up_scale=gate_up_scale, down_scale=down_scale)
    if shared:
        gate_up, gate_up_scale, plain_gate_up = quantise(draw(2 * inter, hidden) * hidden**-0.5)
        down, down_scale, plain_down = quantise(draw(hidden, inter) * inter**-0.5)
        expected += torch.stack([mlp(row.double(), plain_gate_up, plain_down) for row in x])
        weights = ExpertWeights(
            gate_up=weights.gate_up,
            down=weights.down,
            gate_up_scale=weights.gate_up_scale,
            down_scale=weights.down_scale,
            shared_gate_up=gate_up,
            shared_down=down,
            shared_gate_up_scale=gate_up_scale,
            shared_down_scale=down_scale,
        )
    return Problem(
        x=x.to(device),
        ids=torch.tensor(ids, dtype=torch.int32, device=device),
        score=score.to(device),
        weights=weights,
        expected=expected,
    )


def mlp(row: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """row [K] float64."""
    gate, up = (gate_up @ row).chunk(2)
    return down @ (silu(gate) * up)
