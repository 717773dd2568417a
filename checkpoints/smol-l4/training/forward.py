"""One plain forward pass for the dense teacher and the Llama 4 student, differentiable.

Documents are packed: one stream of tokens, cut into segments. A RoPE layer of the student attends inside one chunk of one document, a NoPE
layer (and every layer of the teacher) inside one whole document.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from l4core.demo.arch import EXPERT_FF, EXPERTS, HEAD_DIM, HEADS, KV_HEADS, SLOTS, Arch
from l4core.demo.merge import LayerWeights, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """What depends on each token's place in its document. cos, sin [N, 1, 32]; scale [N, 1, 1] of NoPE queries."""

    cos: torch.Tensor
    sin: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """borders [num_segments + 1] int32, cumulative; longest: tokens."""

    borders: torch.Tensor
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """hidden [N, 576] after the final norm; routers: logits [N, 4] of each layer, None where dense; kept: outputs of the asked layers."""

    hidden: torch.Tensor
    routers: tuple[torch.Tensor | None, ...]
    kept: tuple[torch.Tensor, ...]


def forward(
    weights: Weights, ids: torch.Tensor, lengths: Sequence[int], arch: Arch, *, keep: Collection[int] = ()
) -> Output:
    """ids [N]: packed documents of the given lengths.  keep: layers whose outputs are returned, counted from 0."""
    places = place(positions(lengths, ids.device), arch)
    whole, local = segments(lengths, 0, ids.device), segments(lengths, arch.chunk, ids.device)
    x = F.embedding(ids, weights.embed)
    routers, kept = [], []
    for index, layer in enumerate(weights.layers):
        nope = arch.is_nope(index)
        q, k, v = before_attention(x, layer, places, rope=not nope, eps=arch.eps)
        attended = segment_attention(q, k, v, whole if nope and not arch.nope_chunked else local)
        x, router = after_attention(x, attended, layer, mode=arch.router, eps=arch.eps)
        routers.append(router)
        if index in keep:
            kept.append(x)
    return Output(hidden=rms_norm(x, weights.norm, arch.eps), routers=tuple(routers), kept=tuple(kept))


def before_attention(
    x: torch.Tensor, layer: LayerWeights, places: Positions, *, rope: bool, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ q [N, 9, 64], k and v [N, 3, 64]."""
    projected = rms_norm(x, layer.attn_norm, eps) @ layer.qkv.T
    q, k, v = projected.unflatten(-1, (-1, HEAD_DIM)).split((HEADS, KV_HEADS, KV_HEADS), -2)  # type: ignore[no-untyped-call]
    if rope:
        return rotate(q, places.cos, places.sin), rotate(k, places.cos, places.sin), v
    return (q * places.scale).to(q.dtype), k, v


def after_attention(
    x: torch.Tensor, attended: torch.Tensor, layer: LayerWeights, *, mode: str, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """→ the layer's output and its router's logits. (s·x) W = s·(x W): an expert's input is scaled on its projection, so all experts are one
    matrix product."""
    x = x + attended @ layer.o.T
    h = rms_norm(x, layer.mlp_norm, eps)
    gate_up = h @ layer.gate_up.T
    if layer.router is None:
        gate, up = gate_up.chunk(2, -1)
        return x + (F.silu(gate) * up) @ layer.down.T, None
    logits = h @ layer.router.T
    scaled = gate_up.unflatten(-1, (2, SLOTS, EXPERT_FF)) * expert_scale(logits, mode)[..., None, :, None]  # type: ignore[no-untyped-call]
    active = (F.silu(scaled[..., 0, :, :]) * scaled[..., 1, :, :]).flatten(-2)
    return x + active @ layer.down.T, logits


def expert_scale(logits: torch.Tensor, mode: str) -> torch.Tensor:
    """[N, 5]: 1 for the shared expert, sigmoid of the top logit for the chosen expert, 0 elsewhere. mode: Arch.router."""
    column = torch.arange(EXPERTS, device=logits.device)
    if mode == "off":
        routed = 0.5 * (column == 0).expand(logits.shape)
    else:
        top, index = logits.max(-1, keepdim=True)
        if mode == "shift":
            index = (index + 1) % EXPERTS
        routed = torch.sigmoid(top.float()) * (index == column)
    return torch.cat([torch.ones_like(routed[..., :1]), routed], -1).to(logits.dtype)


def segment_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cut: Segments) -> torch.Tensor:
    """Causal attention inside each segment → [N, 576]."""
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    if q.is_cuda:
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, cut.borders, cut.borders, cut.longest, cut.longest, 0.0, True, False
        )[0]
        return torch.Tensor.flatten(out, 1)
    pieces = []
    for start, end in zip(cut.borders[:-1].tolist(), cut.borders[1:].tolist(), strict=True):
        query, key, value = (t[start:end].transpose(0, 1)[None] for t in (q, k, v))
        pieces.append(F.scaled_dot_product_attention(query, key, value, is_causal=True)[0].transpose(0, 1))
    return torch.cat(pieces).flatten(1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on interleaved pairs."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def positions(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Each token's position in its document."""
    return torch.cat([torch.arange(n) for n in lengths]).to(device)


def place(position: torch.Tensor, arch: Arch) -> Positions:
    """Rotation and query scale at each position."""
    cos, sin = rope_tables(position, arch.theta)
    return Positions(cos=cos, sin=sin, scale=query_scale(position, arch))


def rope_tables(position: torch.Tensor, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [..., 1, 32]."""
    half = torch.arange(0, HEAD_DIM, 2, device=position.device, dtype=torch.float32)
    angle = position.float()[..., None] * theta ** (-half / HEAD_DIM)
    return angle.cos()[..., None, :], angle.sin()[..., None, :]


def query_scale(position: torch.Tensor, arch: Arch) -> torch.Tensor:
    """Attention temperature of NoPE layers: 1 + attn_scale · log1p(⌊(p + 1) / floor_scale⌋)."""
    scale = torch.ones_like(position, dtype=torch.float32)
    if arch.temperature:
        scale = scale + torch.log1p(torch.floor((position.float() + 1) / arch.floor_scale)) * arch.attn_scale
    return scale[..., None, None]


def segments(lengths: Sequence[int], chunk: int, device: torch.device) -> Segments:
    """Borders of documents, each cut into chunks (0: not cut)."""
    sizes = [min(chunk, n - i) for n in lengths for i in range(0, n, chunk)] if chunk else list(lengths)
    borders = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    return Segments(borders=borders.to(device), longest=max(sizes))
