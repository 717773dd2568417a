"""Base + delta = weights. Differentiable with respect to the delta: training merges at every step, so the trained network is the stored one.

Function-preserving split of a dense MLP: even neurons go to the shared expert, odd neurons to every routed expert with gate and up doubled,
because a zero router scales an expert's input by sigmoid(0) = 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from l4core.demo.arch import EXPERT_FF, EXPERTS, HIDDEN, SLOTS
from l4core.demo.base import DenseLayer
from l4core.demo.delta import LayerDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitLayer:
    """The frozen base of one layer, bfloat16. qkv [960, 576], o [576, 576], gate_up [5, 2, 768, 576], down [5, 576, 768]; slot 0 = shared."""

    qkv: torch.Tensor
    o: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer as the training forward pass reads it. gate_up [2·5·768, 576]: gate rows of all slots, then up rows; down [576, 5·768];
    router [4, 576]. A dense layer (the teacher's) has router None, gate_up [2·1536, 576] and down [576, 1536]."""

    attn_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    mlp_norm: torch.Tensor
    router: torch.Tensor | None
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A whole model: embed and head [vocabulary, 576]."""

    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    embed: torch.Tensor
    head: torch.Tensor


def split_layer(dense: DenseLayer) -> SplitLayer:
    """The layer in Llama 4's form, its function unchanged."""

    def rows(w: torch.Tensor) -> torch.Tensor:  # [1536, H] -> [5, 768, H]
        return torch.cat([w[None, 0::2], 2 * w[None, 1::2].expand(EXPERTS, -1, -1)])

    down = torch.cat([dense.down[None, :, 0::2], dense.down[None, :, 1::2].expand(EXPERTS, -1, -1)])
    return SplitLayer(
        qkv=dense.qkv.bfloat16(),
        o=dense.o.bfloat16(),
        gate_up=torch.stack([rows(dense.gate), rows(dense.up)], 1).bfloat16(),
        down=down.bfloat16(),
    )


def merge_layer(base: SplitLayer, delta: LayerDelta, dtype: torch.dtype) -> LayerWeights:
    """Adapters are added in float32, the sum is rounded once to dtype."""
    attention = torch.cat([delta.q.product(), delta.k.product(), delta.v.product()])
    gate_up = (base.gate_up + delta.gate_up.product()).to(dtype)
    down = (base.down + delta.down.product()).to(dtype)
    return LayerWeights(
        attn_norm=delta.attn_norm.to(dtype),
        qkv=(base.qkv + attention).to(dtype),
        o=(base.o + delta.o.product()).to(dtype),
        mlp_norm=delta.mlp_norm.to(dtype),
        router=delta.router.to(dtype),
        gate_up=gate_up.transpose(0, 1).reshape(2 * SLOTS * EXPERT_FF, HIDDEN),
        down=down.transpose(0, 1).reshape(HIDDEN, SLOTS * EXPERT_FF),
    )


def merge_ends(
    embed: torch.Tensor, delta: Mapping[str, torch.Tensor], dtype: torch.dtype, layers: Sequence[LayerWeights]
) -> Weights:
    """Adds embedding, head and final norm. embed [49152, 576] is the base's; the new tokens' rows differ in embedding and head."""
    old = embed.bfloat16().to(dtype)
    return Weights(
        layers=tuple(layers),
        norm=delta["norm"].to(dtype),
        embed=torch.cat([old, delta["new_embed"].to(dtype)]),
        head=torch.cat([old, delta["new_head"].to(dtype)]),
    )
