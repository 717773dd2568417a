"""A random mixture of experts and what it must give, by the definition in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from l4core.plugin_api import ExpertKernel, ExpertWeights


@dataclass(frozen=True, kw_only=True)
class Problem:
    """x [T, H], ids int32 [T], score float32 [T], weights; expected: float64 [T, H]."""

    x: torch.Tensor
    ids: torch.Tensor
    score: torch.Tensor
    weights: ExpertWeights
    expected: torch.Tensor

    def error(self, kernel: ExpertKernel) -> float:
        """Largest difference, relative to the largest value."""
        out = kernel.forward(self.x, self.ids, self.score, self.weights)
        assert out.dtype == self.x.dtype
        assert out.shape == self.x.shape
        return float((out.double().cpu() - self.expected).abs().max() / self.expected.abs().max().clamp(min=1e-30))


def make(
    ids: Sequence[int],
    num_experts: int,
    *,
    hidden: int = 64,
    inter: int = 48,
    dtype: torch.dtype = torch.float32,
    shared: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """ids: −1 = an expert that another rank holds.
    Weights are float64 draws rounded to `dtype` before the expectation is computed, so that a kernel's error is its own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5).to(dtype)

    x = (draw(len(ids), hidden) * hidden**0.5).to(dtype)
    gate_up, down = draw(num_experts, 2 * inter, hidden), draw(num_experts, hidden, inter)
    shared_gate_up, shared_down = draw(2 * inter, hidden), draw(hidden, inter)
    score = torch.rand(len(ids), generator=generator) * 0.9 + 0.05
    expected = torch.stack(
        [
            _expert(row, gate_up[e], down[e], float(s) if e >= 0 else 0.0)
            for row, e, s in zip(x, ids, score, strict=True)
        ]
    )
    if shared:
        expected += torch.stack([_expert(row, shared_gate_up, shared_down, 1.0) for row in x])
    weights = ExpertWeights(
        gate_up=gate_up.to(device),
        down=down.to(device),
        shared_gate_up=shared_gate_up.to(device) if shared else None,
        shared_down=shared_down.to(device) if shared else None,
    )
    return Problem(
        x=x.to(device),
        ids=torch.tensor(ids, dtype=torch.int32, device=device),
        score=score.to(device),
        weights=weights,
        expected=expected,
    )


def _expert(row: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, s: float) -> torch.Tensor:
    gate, up = (s * (gate_up.double() @ row.double())).chunk(2)
    return down.double() @ (torch.nn.functional.silu(gate) * up)
