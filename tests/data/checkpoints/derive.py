"""Writes the manifests in this folder: names, shapes and dtypes of released Llama 4 checkpoints, derived from their published layout.

No released file was opened: every manifest says `"derived": true` and under `assumed` what is not known for certain. Names are compressed:
`{0..47}` stands for 0, 1, …, 47 and `{1..47..2}` for every second one; several ranges in one name mean all combinations.

    python tests/data/checkpoints/derive.py        writes the files again
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RANGE = re.compile(r"\{(\d+)\.\.(\d+)(?:\.\.(\d+))?\}")

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 48, 5120, 40, 8, 128
INTER, INTER_MLP, VOCAB = 8192, 16384, 202048
VISION_HIDDEN, VISION_INTER, VISION_LAYERS, VISION_OUT = 1408, 5632, 34, 4096

Row = dict[str, Any]


def expand(manifest: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of every tensor of a manifest."""
    for row in manifest["tensors"]:
        for name in _names(row["name"]):
            yield name, tuple(row["shape"]), row["dtype"]


def _names(pattern: str) -> Iterator[str]:
    ranges = [range(int(a), int(b) + 1, int(step or 1)) for a, b, step in RANGE.findall(pattern)]
    holes = RANGE.sub("{}", pattern)
    for numbers in itertools.product(*ranges):
        yield holes.format(*numbers)


def row(name: str, *shape: int, dtype: str = "BF16") -> Row:
    return {"name": name, "shape": list(shape), "dtype": dtype}


def fp8(name: str, *shape: int, style: str) -> list[Row]:
    """A quantised weight with its scales. style: channel (a scale an output row) or tensor (weight scale and input scale, no dimension)."""
    rows = [row(name, *shape, dtype="F8_E4M3")]
    stem = name.removesuffix("weight") if name.endswith(".weight") else name + "_"
    if style == "channel":
        return [*rows, row(stem + "weight_scale", shape[0], 1)]
    return [*rows, row(stem + "weight_scale", dtype="F32"), row(stem + "input_scale", dtype="F32")]


def linear(name: str, *shape: int, style: str) -> list[Row]:
    return [row(name, *shape)] if style == "plain" else fp8(name, *shape, style=style)


def attention(prefix: str, style: str, *, kv_scales: bool = False) -> list[Row]:
    at = f"{prefix}layers.{{0..{LAYERS - 1}}}."
    rows = [row(at + f"{norm}_layernorm.weight", HIDDEN) for norm in ("input", "post_attention")]
    for name, out in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
        rows += linear(f"{at}self_attn.{name}_proj.weight", out, HIDDEN, style=style)
    rows += linear(at + "self_attn.o_proj.weight", HIDDEN, HEADS * HEAD_DIM, style=style)
    if kv_scales:
        rows += [row(f"{at}self_attn.{x}_proj.{x}_scale", dtype="F32") for x in "kv"]
    return rows


def mlp(at: str, inter: int, style: str) -> list[Row]:
    rows: list[Row] = []
    for half in ("gate", "up"):
        rows += linear(f"{at}{half}_proj.weight", inter, HIDDEN, style=style)
    return rows + linear(at + "down_proj.weight", HIDDEN, inter, style=style)


def feed_forward(prefix: str, experts: int, *, expert_style: str, style: str) -> list[Row]:
    """Scout (16 experts): MoE everywhere. Maverick (128): MoE in odd layers, dense in even ones. expert_style: plain, channel or tensor."""
    moe = f"{{0..{LAYERS - 1}}}" if experts == 16 else f"{{1..{LAYERS - 1}..2}}"
    at = f"{prefix}layers.{moe}.feed_forward."
    rows = [row(at + "router.weight", experts, HIDDEN), *mlp(at + "shared_expert.", INTER, style)]
    if expert_style == "channel":
        rows += mlp(f"{at}experts.{{0..{experts - 1}}}.", INTER, "channel")
    else:
        rows += linear(at + "experts.gate_up_proj", experts, HIDDEN, 2 * INTER, style=expert_style)
        rows += linear(at + "experts.down_proj", experts, INTER, HIDDEN, style=expert_style)
    if experts != 16:
        rows += mlp(f"{prefix}layers.{{0..{LAYERS - 2}..2}}.feed_forward.", INTER_MLP, style)
    return rows


def ends(prefix: str, head: str) -> list[Row]:
    return [
        row(prefix + "embed_tokens.weight", VOCAB, HIDDEN),
        row(prefix + "norm.weight", HIDDEN),
        row(head + "lm_head.weight", VOCAB, HIDDEN),
    ]


def vision() -> list[Row]:
    at, h = f"vision_model.model.layers.{{0..{VISION_LAYERS - 1}}}.", VISION_HIDDEN
    rows = [
        row("vision_model.class_embedding", h),
        row("vision_model.positional_embedding_vlm", 577, h),
        row("vision_model.patch_embedding.linear.weight", h, 3 * 14 * 14),
    ]
    for name, out, width in (
        *((f"self_attn.{x}_proj", h, h) for x in "qkvo"),
        ("mlp.fc1", VISION_INTER, h),
        ("mlp.fc2", h, VISION_INTER),
    ):
        rows += [row(f"{at}{name}.weight", out, width), row(f"{at}{name}.bias", out)]
    for name in (at + "input_layernorm", at + "post_attention_layernorm"):
        rows += [row(f"{name}.weight", h), row(f"{name}.bias", h)]
    for name in ("vision_model.layernorm_pre", "vision_model.layernorm_post"):
        rows += [row(f"{name}.weight", h), row(f"{name}.bias", h)]
    rows.append(row("vision_model.vision_adapter.mlp.fc1.weight", VISION_OUT, VISION_INTER))
    rows.append(row("vision_model.vision_adapter.mlp.fc2.weight", VISION_OUT, VISION_OUT))
    return [*rows, row("multi_modal_projector.linear_1.weight", HIDDEN, VISION_OUT)]


def text_config(experts: int) -> dict[str, Any]:
    scout = experts == 16
    scaling = {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }
    return {
        "model_type": "llama4_text",
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "attn_scale": 0.1,
        "floor_scale": 8192,
        "bos_token_id": 200000,
        "eos_token_id": [200001, 200007, 200008],
        "pad_token_id": 200018,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "interleave_moe_layer_step": 1 if scout else 2,
        "intermediate_size": INTER,
        "intermediate_size_mlp": INTER_MLP,
        "max_position_embeddings": 10485760 if scout else 1048576,
        "no_rope_layers": [],
        "num_attention_heads": HEADS,
        "num_experts_per_tok": 1,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "num_local_experts": experts,
        "rms_norm_eps": 1e-5,
        "rope_scaling": scaling if scout else None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "use_qk_norm": scout,
        "vocab_size": VOCAB,
    }


def config(experts: int, **more: Any) -> dict[str, Any]:
    """config.json of the image-and-text model."""
    vision_config = {
        "model_type": "llama4_vision_model",
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": VISION_INTER,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 336,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": VISION_OUT,
        "projector_output_dim": VISION_OUT,
        "vision_output_dim": VISION_OUT,
    }
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "torch_dtype": "bfloat16",
        "text_config": text_config(experts),
        "vision_config": vision_config,
        **more,
    }


def plain(experts: int) -> list[Row]:
    p = "language_model.model."
    rows = attention(p, "plain") + feed_forward(p, experts, expert_style="plain", style="plain")
    return ends(p, "language_model.") + rows + vision()


def meta_fp8() -> list[Row]:
    p = "language_model.model."
    rows = attention(p, "plain") + feed_forward(p, 128, expert_style="channel", style="plain")
    return ends(p, "language_model.") + rows + vision()


def nvidia_fp8(experts: int, prefix: str, head: str) -> list[Row]:
    rows = attention(prefix, "tensor", kv_scales=True)
    return ends(prefix, head) + rows + feed_forward(prefix, experts, expert_style="tensor", style="tensor")


COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["re:.*self_attn.*", "re:.*router.*", "re:.*shared_expert.*", "re:vision_model.*", "re:.*lm_head"],
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "ignore": ["lm_head"]}
MODELOPT_ASSUMED = (
    "attention, shared expert and dense layers are quantised too; the cache has scales; no vision tensors"
)


def manifests() -> dict[str, dict[str, Any]]:
    """File name → content."""
    text_only = {"architectures": ["Llama4ForCausalLM"], "torch_dtype": "bfloat16", **text_config(16)}
    text_rows = attention("model.", "plain") + feed_forward("model.", 16, expert_style="plain", style="plain")
    made = {
        "scout": ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "", config(16), plain(16)),
        "maverick": ("meta-llama/Llama-4-Maverick-17B-128E-Instruct", "", config(128), plain(128)),
        "maverick-fp8-meta": (
            "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8",
            "every MoE layer's experts are quantised and nothing else is; scales are stored in bfloat16",
            config(128, quantization_config=COMPRESSED_TENSORS),
            meta_fp8(),
        ),
        "maverick-fp8-nvidia": (
            "nvidia/Llama-4-Maverick-17B-128E-Instruct-FP8",
            f"{MODELOPT_ASSUMED}; names keep the prefix language_model.",
            config(128, quantization_config=MODELOPT),
            nvidia_fp8(128, "language_model.model.", "language_model."),
        ),
        "scout-fp8-nvidia": (
            "nvidia/Llama-4-Scout-17B-16E-Instruct-FP8",
            f"{MODELOPT_ASSUMED}; names have no prefix language_model.",
            config(16, quantization_config=MODELOPT),
            nvidia_fp8(16, "model.", ""),
        ),
        "scout-text-only": ("a text-only export of Scout", "", text_only, ends("model.", "") + text_rows),
    }
    return {
        f"{name}.json": {"derived": True, "model": model, "assumed": assumed, "config": conf, "tensors": rows}
        for name, (model, assumed, conf, rows) in made.items()
    }


def written(manifest: dict[str, Any]) -> str:
    """The file's text: one tensor a line."""
    head = {key: value for key, value in manifest.items() if key != "tensors"}
    rows = ",\n".join("  " + json.dumps(row) for row in manifest["tensors"])
    return json.dumps(head, indent=1).removesuffix("\n}") + ',\n "tensors": [\n' + rows + "\n ]\n}\n"


if __name__ == "__main__":
    for file_name, content in manifests().items():
        (HERE / file_name).write_text(written(content), encoding="utf-8")
