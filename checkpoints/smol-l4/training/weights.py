"""Teacher and student as tensors: the dense base, the split base, and a delta to start training from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from l4core.demo.arch import BASE_VOCAB, END_OF_TEXT, HIDDEN, ID, IM_END, IM_START, SPECIAL, VOCAB
from l4core.demo.base import BaseModel, DenseLayer
from l4core.demo.delta import FILES, layer_deltas, shapes
from l4core.demo.merge import LayerWeights, SplitLayer, Weights, merge_ends, merge_layer, split_layer

NEW_FROM = {
    "<|begin_of_text|>": END_OF_TEXT,
    "<|end_of_text|>": END_OF_TEXT,
    "<|header_start|>": IM_START,
    "<|eom|>": IM_END,
    "<|eot|>": IM_END,
}
"""Which of the base's rows a new token starts from; the others start from the mean of all."""

EXPERT_TENSORS = ("gate_up.A", "gate_up.B", "down.A", "down.B")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The frozen base in Llama 4's form, on a device. embed [49152, 576]."""

    layers: tuple[SplitLayer, ...]
    embed: torch.Tensor
    norm: torch.Tensor
    attn_norm: torch.Tensor
    mlp_norm: torch.Tensor


def read_base(base: BaseModel, layers: int) -> list[DenseLayer]:
    return [base.layer(index) for index in range(layers)]


def teacher_weights(base: BaseModel, dense: list[DenseLayer], device: torch.device, dtype: torch.dtype) -> Weights:
    """The dense base for the shared forward pass; the head is tied to the embedding."""

    def put(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=device, dtype=dtype)

    layers = tuple(
        LayerWeights(
            attn_norm=put(d.attn_norm),
            qkv=put(d.qkv),
            o=put(d.o),
            mlp_norm=put(d.mlp_norm),
            router=None,
            gate_up=put(torch.cat([d.gate, d.up])),
            down=put(d.down),
        )
        for d in dense
    )
    embed = put(base.embed())
    return Weights(layers=layers, norm=put(base.norm()), embed=embed, head=embed)


def split_base(base: BaseModel, dense: list[DenseLayer], device: torch.device) -> Split:
    return Split(
        layers=tuple(moved(split_layer(d), device) for d in dense),
        embed=base.embed().to(device),
        norm=base.norm().to(device),
        attn_norm=torch.stack([d.attn_norm for d in dense]).to(device),
        mlp_norm=torch.stack([d.mlp_norm for d in dense]).to(device),
    )


def student_weights(split: Split, delta: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Weights:
    """Base + delta; differentiable with respect to the delta."""
    layers = [merge_layer(base, part, dtype) for base, part in zip(split.layers, layer_deltas(delta), strict=True)]
    return merge_ends(split.embed, delta, dtype, layers)


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The same weights, rounded as they are stored, in another dtype."""
    layers = tuple(
        replace(layer, **{f.name: t.to(dtype) for f in fields(layer) if (t := getattr(layer, f.name)) is not None})
        for layer in weights.layers
    )
    return Weights(
        layers=layers, norm=weights.norm.to(dtype), embed=weights.embed.to(dtype), head=weights.head.to(dtype)
    )


def moved(layer: SplitLayer, device: torch.device) -> SplitLayer:
    return SplitLayer(**{f.name: getattr(layer, f.name).to(device) for f in fields(layer)})


def init_delta(split: Split, seed: int = 0) -> dict[str, torch.Tensor]:
    """Trainable tensors, float32, on the CPU. Every adapter is B @ A with B = 0, so training starts from the split base itself."""
    generator = torch.Generator().manual_seed(seed)
    delta = {name: torch.zeros(shape) for name, shape in shapes().items()}
    for name, tensor in delta.items():
        if name.endswith(".A"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5)
    delta["norm"], delta["attn_norm"], delta["mlp_norm"] = (
        t.float().cpu().clone() for t in (split.norm, split.attn_norm, split.mlp_norm)
    )
    delta["new_embed"], delta["new_head"] = new_rows(split.embed.cpu()), new_rows(split.embed.cpu())
    return delta


def new_rows(embed: torch.Tensor) -> torch.Tensor:
    """Starting rows of the new tokens [64, 576]; the padding rows stay zero."""
    rows = torch.zeros(VOCAB - BASE_VOCAB, HIDDEN)
    rows[: len(SPECIAL)] = embed.mean(0)
    for name, source in NEW_FROM.items():
        rows[ID[name] - BASE_VOCAB] = embed[source]
    return rows


def save_delta(delta: Mapping[str, torch.Tensor], folder: Path, note: Mapping[str, Any] | None) -> None:
    """Adapters in bfloat16, the rest in float32, in the two files of the build. note: written as training.json."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        name: tensor.detach().to("cpu", torch.bfloat16 if name.endswith((".A", ".B")) else torch.float32).contiguous()
        for name, tensor in delta.items()
    }
    experts, rest = FILES
    save_file({name: stored[name] for name in EXPERT_TENSORS}, folder / experts)
    save_file({name: t for name, t in stored.items() if name not in EXPERT_TENSORS}, folder / rest)
    if note is not None:
        (folder / "training.json").write_text(json.dumps(note, indent=1), encoding="utf-8")
