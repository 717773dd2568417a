"""Llama 4, the text model: 48 layers of attention and (mixture-of-experts) MLP, three of four local, every fourth global.

    local layer   RoPE on q and k, then QK norm; a token sees the current chunk only
    global layer  no RoPE; q times a temperature that grows with the position; a token sees everything before it

Shapes in comments: T tokens of a step, H hidden, Hq / Hkv query / key-value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from l4core.kv.memory import KVMemory
from l4core.model.batch import AttentionSegment, ForwardBatch
from l4core.model.config import ModelConfig
from l4core.model.huge_pages import advise_huge_pages
from l4core.model.layers import Linear, RMSNorm, SwiGLU, parameter
from l4core.model.moe import MoE
from l4core.model.rotary import Rotary, temperature
from l4core.ops.kv_write import kv_write
from l4core.ops.linear import linear
from l4core.ops.norm import qk_norm_
from l4core.ops.rope import rope_
from l4core.plugin_api import AttentionBackend


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What all layers of one step share. rope: chunked? → cos and sin [T, 1, D/2, 2].  temperature: [T, 1, 1], None = off.  slots: KV group
    name → (page, offset in the page) of each new token, int64 [T]."""

    kv: KVMemory
    backend: AttentionBackend
    segments: tuple[AttentionSegment, ...]
    slots: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    rope: Mapping[bool, torch.Tensor]
    temperature: torch.Tensor | None


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.num_q_heads, self.num_kv_heads, self.head_dim = config.num_q_heads, config.num_kv_heads, config.head_dim
        self.is_rope, self.is_chunked = config.rope_layers[layer_id], config.chunked_layers[layer_id]
        self.qk_norm_eps = config.rms_norm_eps if config.use_qk_norm and self.is_rope else None
        q_size, kv_size = self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv = Linear(q_size + 2 * kv_size, config.hidden_size)  # rows q | k | v
        self.o = Linear(config.hidden_size, q_size)

    def forward(self, x: torch.Tensor, step: _Step) -> torch.Tensor:
        """x [T, H] → [T, H]."""
        num_tokens, num_qk = x.shape[0], self.num_q_heads + self.num_kv_heads
        heads = self.qkv(x).contiguous().view(num_tokens, num_qk + self.num_kv_heads, self.head_dim)  # [T, Hq+2Hkv, D]
        q, qk = heads[:, : self.num_q_heads], heads[:, :num_qk]
        kv = heads[:, self.num_q_heads :].view(num_tokens, 2, self.num_kv_heads, self.head_dim)
        if self.is_rope:
            rope_(qk, step.rope[self.is_chunked])
        if self.qk_norm_eps is not None:
            qk_norm_(qk, self.qk_norm_eps)
        if not self.is_rope and step.temperature is not None:
            q.mul_(step.temperature)

        group = step.kv.group_of(self.layer_id)
        kv_write(step.kv.pages(self.layer_id), kv, *step.slots[group])
        view, out = step.kv.view(self.layer_id), torch.empty_like(q, memory_format=torch.contiguous_format)
        for segment in step.segments:
            rows = slice(segment.begin, segment.end)
            step.backend.attend(q[rows], view, segment.plans[group], out[rows])
        y: torch.Tensor = self.o(out.view(num_tokens, -1))
        return y


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, layer_id)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.moe_layers[layer_id]
        if self.is_moe:
            self.moe = MoE(config)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size_mlp)

    def forward(self, x: torch.Tensor, step: _Step) -> torch.Tensor:
        """x: the residual stream [T, H], changed in place."""
        x = x.add_(self.attn(self.attn_norm(x), step))
        feed_forward = self.moe if self.is_moe else self.mlp
        return x.add_(feed_forward(self.mlp_norm(x)))


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = parameter(vocab_size, hidden_size)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [T] → [T, H]."""
        return F.embedding(token_ids, self.weight)


class Llama4(nn.Module):
    """Weights are created empty (on torch's default device and dtype, so a meta model costs nothing) and filled by model.weights."""

    def __init__(self, config: ModelConfig, *, max_positions: int) -> None:
        """max_positions: the largest context that will be served; only a RoPE layer with full attention has a table of that size."""
        super().__init__()
        self.config = config
        self.rotary = Rotary(config, max_positions)
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer_id) for layer_id in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.vocab_size, config.hidden_size)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Llama4:
        """torch's own, with large weights on a CPU in huge pages."""
        super().to_empty(device=device, recurse=recurse)
        advise_huge_pages(self.parameters())
        return self

    def forward(self, batch: ForwardBatch, kv: KVMemory, backend: AttentionBackend) -> torch.Tensor:
        """Computes the batch's tokens, writes their keys and values, returns hidden states after the last norm: [T, H].

        No host sync on an accelerator. Tokens of a step must not depend on each other through more than attention.
        """
        step = self._prepare(batch, kv, backend)
        x = self.embed(batch.token_ids)  # [T, H]
        for layer in self.layers:
            x = layer(x, step)
        normed: torch.Tensor = self.norm(x)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, H] → logits [R, V], float32 (float64 for a float64 model), contiguous."""
        weight = self.embed.weight if self.config.tie_word_embeddings else self.lm_head.weight
        logits = linear(hidden, weight)
        return logits.to(_wide(logits.dtype)).contiguous()

    def _prepare(self, batch: ForwardBatch, kv: KVMemory, backend: AttentionBackend) -> _Step:
        config, wide = self.config, _wide(self.embed.weight.dtype)
        rope = {
            chunked: self.rotary.rows(batch.positions, chunked=chunked, dtype=wide)
            for chunked in (False, True)
            if (True, chunked) in zip(config.rope_layers, config.chunked_layers, strict=True)
        }
        factor = None
        if config.attn_temperature_tuning and not all(config.rope_layers):
            factor = temperature(batch.positions, config, wide).view(-1, 1, 1)
        return _Step(
            kv=kv,
            backend=backend,
            segments=tuple(batch.segments),
            slots={name: (slots // kv.page_size, slots % kv.page_size) for name, slots in batch.slot_mapping.items()},
            rope=rope,
            temperature=factor,
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else is at least float32 where precision matters."""
    return torch.promote_types(dtype, torch.float32)
