"""Llama 4 written from its definition in float64, one sequence, no cache: nothing here is shared with the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def logits_of(config: Any, state: Mapping[str, torch.Tensor], ids: Sequence[int]) -> torch.Tensor:
    """config: transformers' Llama4TextConfig, state: its checkpoint's tensors. → float64 [n, V]."""
    weight = {name.removeprefix("model."): tensor.double() for name, tensor in state.items()}
    num_tokens, heads, kv_heads, dim = len(ids), config.num_attention_heads, config.num_key_value_heads, config.head_dim
    position = torch.arange(num_tokens, dtype=torch.float64)
    angle = position[:, None] * _frequencies(config)  # [n, D/2]
    i, j = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)[None]

    def rms(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        g = x @ gate
        return (g / (1 + (-g).exp()) * (x @ up)) @ down

    def rope(x: torch.Tensor) -> torch.Tensor:
        turned = torch.empty_like(x)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        turned[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        turned[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return turned

    h = weight["embed_tokens.weight"][torch.tensor(ids)]
    for layer in range(config.num_hidden_layers):
        p, is_rope = f"layers.{layer}.", bool(config.no_rope_layers[layer])
        x = rms(h) * weight[p + "input_layernorm.weight"]
        q, k, v = (
            (x @ weight[p + f"self_attn.{name}_proj.weight"].T).view(num_tokens, n, dim)
            for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if is_rope:
            q, k = rope(q), rope(k)
            if config.use_qk_norm:
                q, k = rms(q), rms(k)
        elif config.attn_temperature_tuning:
            q = q * (1 + config.attn_scale * ((position + 1) / config.floor_scale).floor().log1p())[:, None, None]
        visible = j <= i
        if config.layer_types[layer] == "chunked_attention":
            visible = visible & (i // config.attention_chunk_size == j // config.attention_chunk_size)
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        score = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(dim)
        mixed = torch.einsum("hij,jhd->ihd", score.masked_fill(~visible, -math.inf).softmax(-1), v)
        h = h + mixed.reshape(num_tokens, heads * dim) @ weight[p + "self_attn.o_proj.weight"].T

        x, f = rms(h) * weight[p + "post_attention_layernorm.weight"], p + "feed_forward."
        prefix = f + "shared_expert." if layer in config.moe_layers else f
        y = swiglu(x, *(weight[prefix + f"{name}_proj.weight"].T for name in ("gate", "up", "down")))
        if layer in config.moe_layers:
            best, chosen = (x @ weight[f + "router.weight"].T).max(-1)
            for t in range(num_tokens):
                gate, up = weight[f + "experts.gate_up_proj"][chosen[t]].chunk(2, dim=-1)
                y[t] += swiglu(x[t] * best[t].sigmoid(), gate, up, weight[f + "experts.down_proj"][chosen[t]])
        h = h + y
    head = weight["embed_tokens.weight"] if config.tie_word_embeddings else weight["lm_head.weight"]
    return (rms(h) * weight["norm.weight"]) @ head.T


def _frequencies(config: Any) -> torch.Tensor:
    """Radians a token, by the published recipe of llama3 scaling, one pair at a time."""
    rope, found = config.rope_parameters, []
    for pair in range(config.head_dim // 2):
        plain = rope["rope_theta"] ** (-2 * pair / config.head_dim)
        if rope["rope_type"] == "llama3":
            wavelength = 2 * math.pi / plain
            original, low, high = (
                rope["original_max_position_embeddings"],
                rope["low_freq_factor"],
                rope["high_freq_factor"],
            )
            if wavelength > original / low:
                plain /= rope["factor"]
            elif wavelength > original / high:
                smooth = (original / wavelength - low) / (high - low)
                plain = (1 - smooth) * plain / rope["factor"] + smooth * plain
        found.append(plain)
    return torch.tensor(found, dtype=torch.float64)
