"""Writes the demo model as a Hugging Face folder: config.json, generation_config.json and one safetensors file under transformers' names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from l4core.demo import arch as a
from l4core.demo.arch import Arch
from l4core.demo.merge import LayerWeights, Weights


def config(arch: Arch, dtype: str) -> dict[str, Any]:
    """config.json of Llama4ForCausalLM."""
    rope = [not arch.is_nope(i) for i in range(a.LAYERS)]
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "dtype": dtype,
        "vocab_size": a.VOCAB,
        "hidden_size": a.HIDDEN,
        "intermediate_size": a.EXPERT_FF,
        "intermediate_size_mlp": a.DENSE_FF,
        "num_hidden_layers": a.LAYERS,
        "num_attention_heads": a.HEADS,
        "num_key_value_heads": a.KV_HEADS,
        "head_dim": a.HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": a.CONTEXT,
        "rms_norm_eps": arch.eps,
        "attention_bias": False,
        "use_qk_norm": False,
        "num_local_experts": a.EXPERTS,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "moe_layers": list(range(a.LAYERS)),
        "no_rope_layers": [int(r) for r in rope],
        "layer_types": ["chunked_attention" if r else "full_attention" for r in rope],
        "attention_chunk_size": arch.chunk,
        "attn_temperature_tuning": arch.temperature,
        "attn_scale": arch.attn_scale,
        "floor_scale": arch.floor_scale,
        "rope_parameters": {"rope_type": "default", "rope_theta": arch.theta},
        "tie_word_embeddings": False,
        "bos_token_id": a.BOT,
        "eos_token_id": list(a.STOP_IDS),
        "pad_token_id": a.PAD,
    }


def layer_tensors(index: int, layer: LayerWeights) -> dict[str, torch.Tensor]:
    """One MoE layer under transformers' names; experts are fused as [expert, in, out]."""
    assert layer.router is not None, "a dense layer has no place in the demo checkpoint"
    q, k, v = layer.qkv.tensor_split((a.Q_ROWS, a.Q_ROWS + a.KV_ROWS))
    gate, up = layer.gate_up.view(2, a.SLOTS, a.EXPERT_FF, a.HIDDEN)
    down = layer.down.view(a.HIDDEN, a.SLOTS, a.EXPERT_FF).permute(1, 0, 2)
    tensors = {
        "input_layernorm.weight": layer.attn_norm,
        "post_attention_layernorm.weight": layer.mlp_norm,
        "self_attn.q_proj.weight": q,
        "self_attn.k_proj.weight": k,
        "self_attn.v_proj.weight": v,
        "self_attn.o_proj.weight": layer.o,
        "feed_forward.router.weight": layer.router,
        "feed_forward.shared_expert.gate_proj.weight": gate[0],
        "feed_forward.shared_expert.up_proj.weight": up[0],
        "feed_forward.shared_expert.down_proj.weight": down[0],
        "feed_forward.experts.gate_up_proj": torch.cat([gate[1:], up[1:]], 1).transpose(1, 2),
        "feed_forward.experts.down_proj": down[1:].transpose(1, 2),
    }
    return {f"model.layers.{index}.{name}": t.contiguous() for name, t in tensors.items()}


def model_tensors(weights: Weights) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint."""
    tensors = {
        "model.embed_tokens.weight": weights.embed,
        "model.norm.weight": weights.norm,
        "lm_head.weight": weights.head,
    }
    for index, layer in enumerate(weights.layers):
        tensors |= layer_tensors(index, layer)
    return tensors


def write_folder(folder: Path, weights: Weights, arch: Arch) -> None:
    """Writes weights and both configs into an existing folder."""
    from safetensors.torch import save_file

    save_file(model_tensors(weights), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config(arch, str(weights.norm.dtype).removeprefix("torch.")))
    write_json(folder / "generation_config.json", generation_config())


def generation_config() -> dict[str, Any]:
    """generation_config.json; drawn as Llama 4's own files have it, since a model this small says little of sense at temperature 1."""
    drawn = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    return {"bos_token_id": a.BOT, "eos_token_id": list(a.STOP_IDS), "pad_token_id": a.PAD, **drawn}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
