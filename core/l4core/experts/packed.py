"""Experts on a CPU with packed weights: each expert that was hit takes its rows through the whole MLP while they are in the cache."""

from __future__ import annotations

import torch

from l4core.ops.grouped import group_rows
from l4core.ops.linear import linear
from l4core.ops.packed import pack
from l4core.ops.silu_mul import silu_mul
from l4core.plugin_api import ExpertWeights


class PackedExperts:
    """One layer's experts, what `portable.TorchExperts` computes with plain ones."""

    def __init__(self, weights: ExpertWeights) -> None:
        """weights: plain, on a CPU; copied, so that the caller can let them go. The shared expert's may be packed already and are kept."""
        self._gate_up = [pack(expert) for expert in weights.gate_up]  # E of [2I, H]
        self._down = [pack(expert) for expert in weights.down]  # E of [H, I]
        self._shared = (weights.shared_gate_up, weights.shared_down)

    def __call__(self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
        """x [T, H], expert_ids [T], score [T] → [T, H]."""
        groups = group_rows(expert_ids, len(self._down))
        assert groups.spans is not None
        rows = torch.split(groups.pack(x * score.to(x.dtype).unsqueeze(1)), [count for _, count in groups.spans])
        pieces = [self._expert(piece, expert) for piece, (expert, _) in zip(rows, groups.spans, strict=True)]
        routed = groups.unpack(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
        gate_up, down = self._shared
        if gate_up is None or down is None:
            return routed
        return linear(silu_mul(linear(x, gate_up)), down).add_(routed)

    def _expert(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """expert: −1 = another rank's, which adds nothing here."""
        if expert < 0:
            return torch.zeros_like(rows)
        return linear(silu_mul(linear(rows, self._gate_up[expert])), self._down[expert])
