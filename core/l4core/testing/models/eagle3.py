"""Tiny random EAGLE3 drafts as folders, in both formats, for tests and dummy runs. Acceptance is what chance gives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

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
    size, vocab = target["hidden_size"], target["vocab_size"]
    num_aux = len(aux_layers or (0, 0, 0))
    draw = _Draw(seed)
    layer = "midlayer." if layout == "eagle" else "layers.0."
    tensors = {
        "fc.weight": draw.matrix(size, num_aux * size),
        "norm.weight": draw.norm(size),
        "lm_head.weight": draw.matrix(draft_vocab or vocab, size),
        **{f"{layer}{name}": tensor for name, tensor in _layer(draw, target, inter).items()},
    }
    if draft_vocab is not None:
        keep = torch.randperm(vocab, generator=draw.generator)[:draft_vocab].sort().values
        tensors["d2t"] = keep - torch.arange(draft_vocab)
        tensors["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, keep, True)
    if own_embed:
        tensors["embed_tokens.weight"] = draw.matrix(vocab, size)
    if flags.get("norm_before_fc"):
        tensors["input_norm.weight"] = draw.norm(num_aux * size)
    if fc_norm:
        tensors |= {f"fc_norm.{i}.weight": draw.norm(size) for i in range(num_aux)}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    settings: dict[str, Any] = {**flags, "fc_norm": fc_norm}
    if aux_layers is not None:
        settings["eagle_aux_hidden_state_layer_ids"] = list(aux_layers)
    config = _config(layout, _shape(target, inter), draft_vocab, settings)
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return out


class _Draw:
    """Seeded weights: matrices wide enough that wrong attention shows, norms around 1."""

    def __init__(self, seed: int) -> None:
        import torch

        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, *shape: int) -> torch.Tensor:
        import torch

        drawn: torch.Tensor = torch.randn(*shape, generator=self.generator)
        return drawn * float(2.0 / shape[-1] ** 0.5)

    def norm(self, n: int) -> torch.Tensor:
        import torch

        return torch.rand(n, generator=self.generator) * 0.4 + 0.8


def _layer(draw: _Draw, target: Mapping[str, Any], inter: int) -> dict[str, torch.Tensor]:
    """The draft's one layer: it reads the embedding and the state side by side, so q, k and v are twice as wide."""
    size, dim = target["hidden_size"], target["head_dim"]
    heads, kv_heads = target["num_attention_heads"], target["num_key_value_heads"]
    return {
        **{
            f"{name}.weight": draw.norm(size) for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        },
        **{
            f"self_attn.{name}_proj.weight": draw.matrix(count * dim, 2 * size)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        },
        "self_attn.o_proj.weight": draw.matrix(size, heads * dim),
        "mlp.gate_proj.weight": draw.matrix(inter, size),
        "mlp.up_proj.weight": draw.matrix(inter, size),
        "mlp.down_proj.weight": draw.matrix(size, inter),
    }


def _shape(target: Mapping[str, Any], inter: int) -> dict[str, Any]:
    same = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return {
        "model_type": "llama",
        **{name: target[name] for name in same},
        "intermediate_size": inter,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
    }


def _config(
    layout: str, shape: Mapping[str, Any], draft_vocab: int | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    if layout == "eagle":
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            **shape,
            "draft_vocab_size": draft_vocab,
            "eagle_config": settings,
        }
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": draft_vocab,
        "transformer_layer_config": shape,
        **settings,
    }
