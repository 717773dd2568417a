"""Small random Llama 4 checkpoints in the Hugging Face layout, seeded, written by transformers itself.

Weights are drawn four times wider than a fresh model's: logits then have a standard deviation of about 1, and wrong attention shows in them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

SPECIAL_IDS: Mapping[str, int] = MappingProxyType({"bos": 0, "eot": 1, "eos": 2, "eom": 2, "pad": 3})
"""Token ids of a checkpoint without a tokenizer."""

SPECIAL_TOKENS: Mapping[str, str] = MappingProxyType(
    {
        "bos": "<|begin_of_text|>",
        "eot": "<|eot|>",
        "eos": "<|end_of_text|>",
        "eom": "<|eom|>",
        "pad": "<|finetune_right_pad|>",
    }
)

BENCH: Mapping[str, Any] = MappingProxyType(
    {"hidden": 512, "experts": 8, "chunk": 256, "inter": 1024, "head_dim": 64, "floor_scale": 256, "vocab": 10240}
)
"""The model that CPU speed is measured on: `make_tiny_checkpoint(out, **BENCH)`, 129 million parameters."""

VISION: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "vision_output_dim": 64,
        "image_size": 56,
        "patch_size": 14,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    }
)


def text_config(
    *,
    layers: int = 8,
    hidden: int = 256,
    experts: int = 4,
    step: int = 1,
    chunk: int | None = 64,
    inter: int = 512,
    inter_mlp: int = 1024,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 32,
    qk_norm: bool = True,
    scaled_rope: bool = False,
    no_rope_layers: Sequence[int] | None = None,
    no_rope_interval: int = 4,
    temperature: bool = True,
    floor_scale: int = 64,
    rms_norm_eps: float = 1e-5,
    tie: bool = False,
    vocab: int = 1024,
    max_positions: int = 4096,
    scale: float = 4.0,
    special_ids: Mapping[str, int] = SPECIAL_IDS,
) -> Any:
    """transformers' Llama4TextConfig. step: an MoE layer every `step` layers.  chunk, floor_scale: tokens.  scale: width of the drawn weights
    in units of 0.02.  scaled_rope: llama3 scaling that is active at these lengths.  no_rope_layers: 1 = RoPE; None = by interval."""
    from transformers import Llama4TextConfig

    rope: dict[str, Any] = {"rope_theta": 500000.0, "rope_type": "default"}
    if scaled_rope:
        rope |= {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 256}
    return Llama4TextConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inter,
        intermediate_size_mlp=inter_mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        initializer_range=0.02 * scale,
        num_experts_per_tok=1,
        num_local_experts=experts,
        interleave_moe_layer_step=step,
        use_qk_norm=qk_norm,
        no_rope_layers=None if no_rope_layers is None else list(no_rope_layers),
        no_rope_layer_interval=no_rope_interval,
        attention_chunk_size=chunk,
        attn_temperature_tuning=temperature,
        floor_scale=floor_scale,
        attn_scale=0.1,
        rms_norm_eps=rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=tie,
        bos_token_id=special_ids["bos"],
        eos_token_id=[special_ids["eos"], special_ids["eom"], special_ids["eot"]],
        pad_token_id=special_ids["pad"],
    )


def random_model(config: Any, *, seed: int = 0, vision: bool = False) -> Any:
    """transformers' model of `config` (a Llama4TextConfig) in float32, seeded; norm weights are spread around 1 so that a dropped one shows."""
    import torch
    from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4VisionConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if vision:
            model = Llama4ForConditionalGeneration(
                Llama4Config(text_config=config, vision_config=Llama4VisionConfig(**VISION), image_token_index=4)
            )
        else:
            model = Llama4ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                torch.nn.init.uniform_(parameter, 0.8, 1.2)
    return model.eval().requires_grad_(False)


def make_tiny_checkpoint(
    out: Path,
    *,
    seed: int = 0,
    vision: bool = False,
    dtype: str = "float32",
    tokenizer: Path | None = None,
    **shape: Any,
) -> Path:
    """Writes config.json, generation_config.json and safetensors into `out` and returns it.

    shape: arguments of `text_config`.  vision: Llama4ForConditionalGeneration with a tiny vision half.  tokenizer: a folder whose files are
    copied beside the weights; vocabulary size and special ids then come from it.
    """
    import torch
    from transformers import GenerationConfig

    special_ids: Mapping[str, int] = SPECIAL_IDS
    if tokenizer is not None:
        special_ids, shape["vocab"] = _read_tokenizer(tokenizer)
    config = text_config(special_ids=special_ids, **shape)
    model = random_model(config, seed=seed, vision=vision).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(out, max_shard_size="200MB")
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            shutil.copy(file, out)
    return out


def _read_tokenizer(folder: Path) -> tuple[Mapping[str, int], int]:
    """(special ids, vocabulary size) of a tokenizer folder that has Llama 4's special tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in SPECIAL_TOKENS.items()}, len(tokenizer)
