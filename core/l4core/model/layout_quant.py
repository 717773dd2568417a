"""Quantised checkpoints: which schemes are mapped, and the scale parameters that go with the weights of layout.py. Torch-free.

Mapped are compressed-tensors FP8 (Meta's Maverick FP8: one tensor an expert, a scale per output channel), ModelOpt FP8 (NVIDIA's: fused
experts, one scale and one input scale a tensor) and compressed-tensors' pack-quantized INT4 (symmetric, a scale for 128 inputs, eight values an
int32). Which modules are quantised is read off the scales present, not off the config's ignore list: a scale without FP8 weights, FP8 weights
without a scale, or a scale of another shape is a named problem. Scales lie beside the rows they belong to, and q and k rows keep the checkpoint's
order here, so nothing has to be permuted. Scale parameters are called like their weight with the checkpoint's ending: `…attn.qkv.weight_scale`,
`…experts.gate_up_input_scale`, packed weights `…attn.qkv.weight_packed`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from l4core.errors import CheckpointError, NotBuiltError
from l4core.model.config import ModelConfig
from l4core.model.layout import Parameter, Part
from l4core.model.safetensors_index import StoredTensor
from l4core.quant.formats import GROUP

WEIGHT_SCALE, INPUT_SCALE = "weight_scale", "input_scale"
KV_SCALES = ("k_scale", "v_scale")
KV_ONLY = ("quant_algo", "kv_cache_quant_algo", "kv_cache_scheme")
"""Keys of a quantization_config without quantised weights: the first is null."""
MODELOPT_FP8, COMPRESSED_FP8, COMPRESSED_INT4 = "ModelOpt FP8", "compressed-tensors FP8", "compressed-tensors INT4"
PACKED = "_packed"
PER_WORD = 8
"""Values in an int32 of a packed weight."""


def scheme_of(quantization: Mapping[str, Any] | None) -> str | None:
    """Name of the scheme in a quantization_config (or the content of hf_quant_config.json), None for plain weights.

    Raises NotBuiltError naming the scheme when its layout is not mapped.
    """
    if not quantization:
        return None
    inner = quantization.get("quantization", quantization)
    method = quantization.get("quant_method") or (quantization.get("producer") or {}).get("name") or "unnamed"
    if not (quantization.get("config_groups") or inner.get("quant_algo")) and any(key in inner for key in KV_ONLY):
        return None  # only the KV cache is quantised, or nothing
    if method == "modelopt" and inner.get("quant_algo") == "FP8":
        return MODELOPT_FP8
    groups = list((quantization.get("config_groups") or {}).values())
    weights = [group.get("weights") or {} for group in groups]
    if method == "compressed-tensors" and weights and all(_is_fp8(w) for w in weights):
        return COMPRESSED_FP8
    if method == "compressed-tensors" and weights and all(_is_int4(w) for w in weights):
        return COMPRESSED_INT4
    details = [inner.get("quant_algo"), quantization.get("format"), quantization.get("bits")]
    details += [f"{w.get('num_bits')}-bit {w.get('type')}, {w.get('strategy')}" for w in weights]
    shown = "; ".join(str(detail) for detail in details if detail)
    raise NotBuiltError(
        f"the weights are quantised with {method}{f' ({shown})' if shown else ''}, a layout this version of L4 does not know",
        fix="serve the bfloat16 checkpoint of this model",
    )


def check_kv_scheme(quantization: Mapping[str, Any]) -> None:
    """Raises NotBuiltError when the checkpoint wants its KV cache in another format than fp8 with one scale a layer."""
    inner = quantization.get("quantization", quantization)
    scheme, algorithm = inner.get("kv_cache_scheme"), inner.get("kv_cache_quant_algo")
    is_fp8 = isinstance(scheme, Mapping) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
    if algorithm not in (None, "FP8") or (scheme is not None and not (is_fp8 and scheme["strategy"] == "tensor")):
        raise NotBuiltError(
            f"the checkpoint's scales are for KV quantised as {algorithm or scheme}, which this version of L4 does not know",
            fix="--kv-cache-dtype auto",
        )


def with_folder_scheme(config: ModelConfig, folder: Path) -> ModelConfig:
    """The config with the quantisation that older ModelOpt exports write into hf_quant_config.json instead of config.json."""
    path = folder / "hf_quant_config.json"
    if config.quantization_config is not None or not path.is_file():
        return config
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; wanted an object")
    return dataclasses.replace(config, quantization_config=found)


def _is_fp8(weights: Mapping[str, Any]) -> bool:
    return (
        weights.get("num_bits") == 8
        and weights.get("type") == "float"
        and weights.get("strategy") in ("channel", "tensor")
    )


def _is_int4(weights: Mapping[str, Any]) -> bool:
    return (
        weights.get("num_bits") == 4
        and weights.get("type") == "int"
        and weights.get("strategy") == "group"
        and weights.get("group_size") == GROUP
        and weights.get("symmetric") is True
        and weights.get("actorder") in (None, "weight", "static")
    )


def packed(parameter: Parameter, stored: Mapping[str, StoredTensor]) -> tuple[Parameter, Parameter] | None:
    """(packed weight, scale) of a weight of a pack-quantized checkpoint, out by in: [rows, K/8] and [rows, K/128], or with experts in front.
    None where no part of it is packed."""
    if not any(part.source + PACKED in stored for part in parameter.parts):
        return None
    return _per_input(parameter, PACKED, PER_WORD), _per_input(parameter, "_scale", GROUP)


def _per_input(parameter: Parameter, ending: str, inputs: int) -> Parameter:
    """One number for `inputs` inputs of an output."""
    parts = tuple(_fewer_inputs(part, ending, inputs) for part in parameter.parts)
    rows = sum(part.shape[0] for part in parts if part.expert == parts[0].expert)
    lead = () if parts[0].expert is None else (parameter.shape[0],)
    stack = len(lead) + (1 if parameter.parts[0].split == 1 else 0)
    name = f"{parameter.name.removesuffix('.weight')}{'.weight' if parameter.name.endswith('.weight') else '_weight'}{ending}"
    return Parameter(name=name, shape=(*lead, rows, parts[0].shape[1]), parts=parts, stack=stack, routed=bool(lead))


def _fewer_inputs(part: Part, ending: str, inputs: int) -> Part:
    cut = part.split == 1
    return dataclasses.replace(
        part,
        source=part.source + ending,
        shape=(part.shape[0], -(-part.shape[1] // inputs)),
        size=-(-part.size // inputs) if cut else part.size,
        unit=max(1, part.unit // inputs) if cut else part.unit,
        transpose=False,
    )


def scales(parameter: Parameter, stored: Mapping[str, StoredTensor]) -> list[Parameter]:
    """The scale parameters of one weight: none when its module is not quantised. stored: by checkpoint name without prefix."""
    parts = list({part.source: part for part in parameter.parts}.values())
    made = []
    for kind in (WEIGHT_SCALE, INPUT_SCALE):
        found = next((stored[name] for part in parts if (name := scale_name(part.source, kind)) in stored), None)
        if found is not None:
            per_tensor = kind == INPUT_SCALE or found.shape in ((), (1,))
            make = _per_tensor if per_tensor else _per_channel
            made.append(make(parameter, parts, kind))
    return made


def scale_name(source: str, kind: str) -> str:
    """`….q_proj.weight` → `….q_proj.weight_scale`; the fused `….gate_up_proj` → `….gate_up_proj_weight_scale`."""
    return f"{source.removesuffix('weight')}{kind}" if source.endswith(".weight") else f"{source}_{kind}"


def kv_scales(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> Iterator[Parameter]:
    """`layers.N.attn.{k,v}_scale` [1] of checkpoints that scale the KV cache, under either of the names in use."""
    for layer in range(config.num_layers):
        for scale in KV_SCALES:
            for name in (f"{scale[0]}_proj.{scale}", scale):
                source = f"layers.{layer}.self_attn.{name}"
                if source in stored:
                    part = Part(source=source, shape=(1,))
                    yield Parameter(name=f"layers.{layer}.attn.{scale}", shape=(1,), parts=(part,))


def _per_tensor(parameter: Parameter, parts: list[Part], kind: str) -> Parameter:
    """One float a checkpoint tensor: [parts], or [experts, parts of an expert]."""
    made = tuple(Part(source=scale_name(p.source, kind), shape=(1,), expert=p.expert) for p in parts)
    if parts[0].expert is None:
        return Parameter(name=scale_name(parameter.name, kind), shape=(len(parts),), parts=made)
    experts = parameter.shape[0]
    return Parameter(
        name=scale_name(parameter.name, kind), shape=(experts, len(parts) // experts), parts=made, stack=1, routed=True
    )


def _per_channel(parameter: Parameter, parts: list[Part], kind: str) -> Parameter:
    """One float an output row: [rows, 1] stacked like the weight's rows, or [experts, rows, 1]; cut over ranks where the rows are."""
    made = tuple(
        dataclasses.replace(
            part,
            source=scale_name(part.source, kind),
            shape=(part.shape[0], 1),
            split=part.split if part.split == 0 else None,
            transpose=False,
        )
        for part in parts
    )
    rows = sum(part.shape[0] for part in parts if part.expert == parts[0].expert)
    lead = () if parts[0].expert is None else (parameter.shape[0],)
    return Parameter(
        name=scale_name(parameter.name, kind), shape=(*lead, rows, 1), parts=made, stack=len(lead), routed=bool(lead)
    )
