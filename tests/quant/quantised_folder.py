"""Tiny checkpoints in each quantised format, made from a plain one, each with the plain checkpoint that holds exactly the same numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
E4M3 = torch.float8_e4m3fn
LINEAR = ("self_attn.", "feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj", "shared_expert.")
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
CHANNEL_FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}


def weights(**args: Any) -> dict[str, Any]:
    """A compressed-tensors config. args: of its weights."""
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": args}}}


PACKED_INT4 = weights(num_bits=4, type="int", strategy="group", group_size=128, symmetric=True)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """stored: quantised.  plain: float32, the same numbers."""

    stored: Path
    plain: Path


def channel_fp8(tensors: Tensors, stored: Tensors, plain: Tensors) -> None:
    """compressed-tensors FP8 as Meta's Maverick, and q, k, v, o too: one tensor an expert, a scale an output row. Every row's scale is another."""
    for name, weight in one_each(tensors).items():
        if ".experts." not in name and not is_linear(name):
            stored[name] = plain[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 448
        stored[name] = (weight / scale).to(E4M3)
        stored[f"{name}_scale"] = scale
        plain[name] = stored[name].float() * scale


def modelopt_fp8(tensors: Tensors, stored: Tensors, plain: Tensors) -> None:
    """ModelOpt FP8 as NVIDIA's: fused experts, one scale and one input scale a tensor."""
    for name, weight in tensors.items():
        if ".experts." not in name and not is_linear(name):
            stored[name] = plain[name] = weight
            continue
        scale = weight.abs().max() / 448
        stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
        stored[name] = (weight / scale).to(E4M3)
        stored[f"{stem}weight_scale"], stored[f"{stem}input_scale"] = scale.clone(), torch.tensor(0.01)
        plain[name] = stored[name].float() * scale


def packed_int4(tensors: Tensors, stored: Tensors, plain: Tensors) -> None:
    """compressed-tensors pack-quantized INT4 on every expert, routed and shared."""
    for name, weight in one_each(tensors).items():
        if ".experts." not in name and "shared_expert." not in name:
            stored[name] = plain[name] = weight
            continue
        rows, inputs = weight.shape
        groups = weight.view(rows, -1, 128)
        scale = (groups.abs().amax(2) / 7.5).bfloat16()
        values = (groups / scale.float().unsqueeze(2)).round().clamp(-8, 7)
        plain[name] = (values * scale.float().unsqueeze(2)).view(rows, inputs)
        nibbles = (values.view(rows, inputs // 8, 8) + 8).to(torch.int64)
        words = (nibbles << (4 * torch.arange(8))).sum(2)
        stored[f"{name}_packed"] = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
        stored[f"{name}_scale"], stored[f"{name}_shape"] = scale, torch.tensor([rows, inputs])


def make(
    source: Path, out: Path, change: Callable[[Tensors, Tensors, Tensors], None], config: Mapping[str, Any]
) -> Pair:
    """source: a plain float32 folder.  config: its quantization_config."""
    tensors = load_file(source / "model.safetensors")
    stored: Tensors = {}
    plain: Tensors = {}
    change(tensors, stored, plain)
    pair = Pair(stored=out / "stored", plain=out / "plain")
    for folder, content in ((pair.stored, stored), (pair.plain, plain)):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, folder / "model.safetensors")
    set_quantization(pair.stored, config)
    return pair


def set_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes `quantization_config` into the folder's config.json."""
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))


def is_linear(name: str) -> bool:
    """A matrix that FP8 checkpoints may quantise, experts aside."""
    return any(part in name for part in LINEAR)


def one_each(tensors: Tensors) -> Tensors:
    """The same weights with one [out, in] matrix an expert and projection."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            stem, half = name.removesuffix("gate_up_proj"), tensor.shape[2] // 2
            for e, matrix in enumerate(tensor):
                made[f"{stem}{e}.gate_proj.weight"] = matrix[:, :half].T.contiguous()
                made[f"{stem}{e}.up_proj.weight"] = matrix[:, half:].T.contiguous()
        elif name.endswith("experts.down_proj"):
            for e, matrix in enumerate(tensor):
                made[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = matrix.T.contiguous()
        else:
            made[name] = tensor
    return made
