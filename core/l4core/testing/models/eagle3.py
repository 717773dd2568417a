"""Tiny random EAGLE3 drafts as folders, in both formats, for tests and dummy runs. Acceptance is what chance gives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

__all__ = ["make_tiny_draft"]


def make_tiny_draft(
    out: Path,
    target: Mapping[str, Any],
    *,
    layout: Literal["eagle", "speculators"] = "eagle",
    draft_vocab: int | None = None,
    inter: int = 96,
    aux_layers: Sequence[int] | None = None,
    own_embed: bool = False,
    fc_norm: bool = False,
    seed: int = 0,
    **flags: bool,
) -> Path:
    """Writes config.json and model.safetensors. target: config.json of the target (text half).  draft_vocab: None = the target's.
    aux_layers: as the format counts them.  flags: norm_before_residual, norm_before_fc, norm_output."""
    import torch
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    size, vocab, dim = target["hidden_size"], target["vocab_size"], target["head_dim"]
    heads, kv_heads = target["num_attention_heads"], target["num_key_value_heads"]
    num_aux = len(aux_layers or (0, 0, 0))
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(*shape, generator=generator)
        return drawn * float(2.0 / shape[-1] ** 0.5)

    def norm(n: int) -> torch.Tensor:
        return torch.rand(n, generator=generator) * 0.4 + 0.8

    layer = "midlayer." if layout == "eagle" else "layers.0."
    tensors = {
        "fc.weight": random(size, num_aux * size),
        "norm.weight": norm(size),
        "lm_head.weight": random(draft_vocab or vocab, size),
        **{
            f"{layer}{name}.weight": norm(size)
            for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        },
        **{
            f"{layer}self_attn.{name}_proj.weight": random(count * dim, 2 * size)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        },
        f"{layer}self_attn.o_proj.weight": random(size, heads * dim),
        f"{layer}mlp.gate_proj.weight": random(inter, size),
        f"{layer}mlp.up_proj.weight": random(inter, size),
        f"{layer}mlp.down_proj.weight": random(size, inter),
    }
    if draft_vocab is not None:
        keep = torch.randperm(vocab, generator=generator)[:draft_vocab].sort().values
        tensors["d2t"] = keep - torch.arange(draft_vocab)
        tensors["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, keep, True)
    if own_embed:
        tensors["embed_tokens.weight"] = random(vocab, size)
    if flags.get("norm_before_fc"):
        tensors["input_norm.weight"] = norm(num_aux * size)
    if fc_norm:
        tensors |= {f"fc_norm.{i}.weight": norm(size) for i in range(num_aux)}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shape = {
        "model_type": "llama",
        "hidden_size": size,
        "intermediate_size": inter,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
    }
    settings: dict[str, Any] = {**flags, "fc_norm": fc_norm}
    if aux_layers is not None:
        settings["eagle_aux_hidden_state_layer_ids"] = list(aux_layers)
    config = (
        {
            "architectures": ["LlamaForCausalLMEagle3"],
            **shape,
            "draft_vocab_size": draft_vocab,
            "eagle_config": settings,
        }
        if layout == "eagle"
        else {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "draft_vocab_size": draft_vocab,
            "transformer_layer_config": shape,
            **settings,
        }
    )
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return out
