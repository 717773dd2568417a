"""Routed experts by AITER's `fused_moe`. Imported only when it was chosen."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from l4_aiter.probe import FIX
from l4core.plugin_api import BackendUnavailable, ExpertContext, ExpertKernel, ExpertWeights

FUNCTION, SHUFFLE = ("aiter.fused_moe", "fused_moe"), ("aiter.ops.shuffle", "shuffle_weight")
Function: TypeAlias = Callable[..., Any]


class AiterExperts(ExpertKernel):
    """The kernel reads each expert's weights in tiles of 16 by 32, so they are put into that order once. The shared expert is two plain products."""

    def __init__(self, fused_moe: Function, shuffle: Function) -> None:
        self._fused_moe = fused_moe
        self._shuffle = shuffle

    def prepare(self, weights: ExpertWeights) -> None:
        for stacked in (weights.gate_up, weights.down):
            for weight in stacked:  # one expert's copy at a time
                weight.copy_(self._shuffle(weight))

    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        routed: torch.Tensor = self._fused_moe(**arguments(x, expert_ids, score, weights))
        if weights.shared_gate_up is None:
            return routed
        assert weights.shared_down is not None
        gate, up = F.linear(x, weights.shared_gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(up), weights.shared_down).add_(routed)


def arguments(
    x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights
) -> dict[str, object]:
    """Of `fused_moe`, the same in every version. doweight_stage1: the score scales what comes out of gate and up, not the expert's result."""
    return {
        "hidden_states": x,
        "w1": weights.gate_up,
        "w2": weights.down,
        "topk_weight": score.float().unsqueeze(1),
        "topk_ids": expert_ids.unsqueeze(1),
        "doweight_stage1": True,
    }


def create(ctx: ExpertContext) -> AiterExperts:
    """Raises BackendUnavailable when AITER does not import here, or its function takes other arguments."""
    fused_moe, shuffle = _find(*FUNCTION), _find(*SHUFFLE)
    nothing = torch.empty(0)
    try:
        given = arguments(nothing, nothing, nothing, ExpertWeights(gate_up=nothing, down=nothing))
        inspect.signature(fused_moe).bind(**given)
    except TypeError as error:
        raise BackendUnavailable(f"aiter's fused_moe is of a version that is not known: {error}", fix=FIX) from error
    return AiterExperts(fused_moe, shuffle)


def _find(module: str, name: str) -> Function:
    try:
        found: Function = getattr(importlib.import_module(module), name)
    except Exception as error:
        reason = f"{module}: {type(error).__name__}: {' '.join(str(error).split())}"
        raise BackendUnavailable(f"aiter cannot be used: {reason}", fix=FIX) from error
    return found
