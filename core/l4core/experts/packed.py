"""Experts on a CPU with packed weights: each expert that was hit takes its rows through the whole MLP while they are in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from l4core.ops.grouped import group_rows
from l4core.ops.linear import linear
from l4core.ops.packed import LEAST_ROWS, pack, packed_linear
from l4core.ops.silu_mul import silu_mul
from l4core.plugin_api import ExpertWeights

JOIN_ROWS = 128
"""Up to this many rows the gates of all experts are computed together: fewer small operations are worth copying their inputs side by side."""


class PackedExperts:
    """One layer's experts, what `portable.TorchExperts` computes with plain ones."""

    def __init__(self, weights: ExpertWeights) -> None:
        """weights: plain, on a CPU; copied, so that the caller can let them go. The shared expert's may be packed already and are kept."""
        self._gate_up = [pack(expert) for expert in weights.gate_up]  # E of [2I, H]
        self._down = [pack(expert) for expert in weights.down]  # E of [H, I]
        self._shared = (weights.shared_gate_up, weights.shared_down)

    @property
    def nbytes(self) -> int:
        """Of the routed experts."""
        return sum(weight.numel() * weight.element_size() for weight in (*self._gate_up, *self._down))

    def __call__(self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
        """x [T, H], expert_ids [T], score [T] → [T, H]."""
        # one gather fills small groups up; a row alone is cheaper to repeat
        least = 1 if x.shape[0] == 1 else LEAST_ROWS
        groups = group_rows(expert_ids, len(self._down), least)
        assert groups.spans is not None
        routed = groups.unpack(self._routed(groups.pack(x * score.to(x.dtype).unsqueeze(1)), groups.spans))
        gate_up, down = self._shared
        if gate_up is None or down is None:
            return routed
        return linear(silu_mul(linear(x, gate_up)), down).add_(routed)

    def _routed(self, rows: torch.Tensor, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        """rows: packed, each group as long as its span says."""
        if len(spans) == 1:
            return self._expert(rows, spans[0][0])
        counts = [count for _, count in spans]
        if rows.shape[0] > JOIN_ROWS or min(expert for expert, _ in spans) < 0:
            return torch.cat(
                [
                    self._expert(piece, expert)
                    for piece, (expert, _) in zip(torch.split(rows, counts), spans, strict=True)
                ]
            )
        pieces = zip(torch.split(rows, counts), spans, strict=True)
        gated = silu_mul(torch.cat([packed_linear(piece, self._gate_up[expert]) for piece, (expert, _) in pieces]))
        pieces = zip(torch.split(gated, counts), spans, strict=True)
        return torch.cat([packed_linear(piece, self._down[expert]) for piece, (expert, _) in pieces])

    def _expert(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """expert: −1 = another rank's, which adds nothing here."""
        if expert < 0:
            return torch.zeros_like(rows)
        return packed_linear(silu_mul(packed_linear(rows, self._gate_up[expert])), self._down[expert])
