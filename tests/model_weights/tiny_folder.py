"""A tiny Llama 4 of four layers (dense and MoE): its tensors in the Hugging Face layout, its folder, and what its parameters must hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from l4core.model.config import ModelConfig
from l4core.model.safetensors_index import StoredTensor
from l4core.model.weight_plan import plan_weights

TINY = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "dtype": "float32",
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "num_local_experts": 3,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "vocab_size": 56,
    "attention_chunk_size": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}

Tensors = dict[str, torch.Tensor]


def tiny_config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**TINY, **changes})


def hf_tensors(config: ModelConfig, *, one_each: bool = False, seed: int = 0) -> Tensors:
    """Random tensors under the checkpoint's names without prefix. one_each: every expert has its own three matrices."""
    generator = torch.Generator().manual_seed(seed)
    made: Tensors = {}

    def draw(name: str, *shape: int) -> None:
        made[name] = torch.randn(shape, generator=generator)

    h, inter = config.hidden_size, config.intermediate_size
    draw("embed_tokens.weight", config.vocab_size, h)
    draw("norm.weight", h)
    if not config.tie_word_embeddings:
        draw("lm_head.weight", config.vocab_size, h)
    for i, moe in enumerate(config.moe_layers):
        at = f"layers.{i}."
        draw(at + "input_layernorm.weight", h)
        draw(at + "post_attention_layernorm.weight", h)
        for x, heads in (("q", config.num_q_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
            draw(f"{at}self_attn.{x}_proj.weight", heads * config.head_dim, h)
        draw(at + "self_attn.o_proj.weight", h, config.num_q_heads * config.head_dim)
        at += "feed_forward."
        for x in ("shared_expert.",) if moe else ("",):
            width = inter if moe else config.intermediate_size_mlp
            draw(f"{at}{x}gate_proj.weight", width, h)
            draw(f"{at}{x}up_proj.weight", width, h)
            draw(f"{at}{x}down_proj.weight", h, width)
        if moe:
            draw(at + "router.weight", config.num_experts, h)
            draw(at + "experts.gate_up_proj", config.num_experts, h, 2 * inter)
            draw(at + "experts.down_proj", config.num_experts, inter, h)
    return split_experts(made) if one_each else made


def split_experts(tensors: Tensors) -> Tensors:
    """The same weights with one [out, in] matrix an expert and projection."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if ".experts.gate_up_proj" in name:
            stem, half = name.removesuffix("gate_up_proj"), tensor.shape[2] // 2
            for e in range(len(tensor)):
                made[f"{stem}{e}.gate_proj.weight"] = tensor[e, :, :half].T.contiguous()
                made[f"{stem}{e}.up_proj.weight"] = tensor[e, :, half:].T.contiguous()
        elif ".experts.down_proj" in name:
            for e in range(len(tensor)):
                made[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = tensor[e].T.contiguous()
        else:
            made[name] = tensor
    return made


def prefixed(tensors: Tensors, *, wrapped: bool) -> Tensors:
    """Full names as a text-only export (model.…) or as an image-and-text checkpoint (language_model.model.…) writes them."""
    outer = "language_model." if wrapped else ""
    return {f"{outer}{'' if name.startswith('lm_head') else 'model.'}{name}": t for name, t in tensors.items()}


def whole_parameters(config: ModelConfig, t: Tensors) -> Tensors:
    """What the parameters must hold at world 1, written out by hand from fused tensors (the oracle of the loader)."""
    want = {"embed.weight": t["embed_tokens.weight"], "norm.weight": t["norm.weight"]}
    if "lm_head.weight" in t:
        want["lm_head.weight"] = t["lm_head.weight"]
    for i, moe in enumerate(config.moe_layers):
        a, f, ours = f"layers.{i}.self_attn.", f"layers.{i}.feed_forward.", f"layers.{i}."
        want[ours + "attn_norm.weight"] = t[ours + "input_layernorm.weight"]
        want[ours + "mlp_norm.weight"] = t[ours + "post_attention_layernorm.weight"]
        want[ours + "attn.qkv.weight"] = torch.cat([t[f"{a}{x}_proj.weight"] for x in "qkv"])
        want[ours + "attn.o.weight"] = t[a + "o_proj.weight"]
        if moe:
            want[ours + "moe.router.weight"] = t[f + "router.weight"]
            want[ours + "moe.experts.gate_up"] = t[f + "experts.gate_up_proj"]
            want[ours + "moe.experts.down"] = t[f + "experts.down_proj"]
        inner, theirs = ("moe.shared.", f + "shared_expert.") if moe else ("mlp.", f)
        want[ours + inner + "gate_up.weight"] = torch.cat([t[f"{theirs}{x}_proj.weight"] for x in ("gate", "up")])
        want[ours + inner + "down.weight"] = t[theirs + "down_proj.weight"]
    return want


def empty_parameters(
    config: ModelConfig, stored: dict[str, StoredTensor], *, dtype: torch.dtype = torch.float32, **shard: int
) -> Tensors:
    """Parameters of one rank, full of NaN so that a hole shows."""
    plan = plan_weights(stored, config, **shard)
    return {target.name: torch.full(target.shape, torch.nan, dtype=dtype) for target in plan.targets}


SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}


def as_stored(tensors: Tensors) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(name=name, shape=tuple(t.shape), dtype=SAFETENSORS_NAMES[t.dtype])
        for name, t in tensors.items()
    }


def write_checkpoint(folder: Path, tensors: Tensors, *, shards: int = 1, config: dict[str, Any] | None = None) -> Path:
    """A checkpoint folder with config.json, a tokenizer.json and `shards` shards (with an index when there are several)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or TINY))
    (folder / "tokenizer.json").write_text("{}")
    names = sorted(tensors)
    weight_map = {}
    for s in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{s + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name].contiguous() for name in names[s::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[s::shards], file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
