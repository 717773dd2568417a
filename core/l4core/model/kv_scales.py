"""Scales of an fp8 KV cache, as a checkpoint states them: one float a layer for keys and one for values. Torch-free.

compressed-tensors declares them as `kv_cache_scheme`, ModelOpt as `kv_cache_quant_algo`; both store `self_attn.{k,v}_scale` or
`self_attn.{k,v}_proj.{k,v}_scale` ([] or [1]). A checkpoint that declares none is served with scale 1.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path

from l4core.errors import CheckpointError
from l4core.model.config import ModelConfig
from l4core.model.layout_quant import check_kv_scheme, kv_scales, with_folder_scheme
from l4core.model.safetensors_index import StoredTensor, read_folder
from l4core.model.weight_plan import short_name


def read_kv_scales(folder: Path, config: ModelConfig) -> Mapping[int, tuple[float, float]]:
    """Layer → (k, v); a layer that states only one has 1.0 for the other, one that states none is left out.

    Raises CheckpointError for a scale that is not a positive number, NotBuiltError for scales of another format than fp8.
    """
    quantization = with_folder_scheme(config, folder).quantization_config
    if not quantization:
        return {}
    check_kv_scheme(quantization)
    index = read_folder(folder)
    stored = {short: tensor for name, tensor in index.tensors.items() if (short := short_name(name)) is not None}
    found: dict[int, list[float]] = {}
    for parameter in kv_scales(config, stored):
        layer, which = int(parameter.name.split(".")[1]), parameter.name.endswith("v_scale")
        found.setdefault(layer, [1.0, 1.0])[which] = _number(folder, stored[parameter.parts[0].source])
    return {layer: (k, v) for layer, (k, v) in found.items()}


def _number(folder: Path, tensor: StoredTensor) -> float:
    with (folder / tensor.shard).open("rb") as file:
        file.seek(tensor.start)
        raw = file.read(4 if tensor.dtype == "F32" else 2)
    if tensor.dtype == "BF16":
        raw = b"\0\0" + raw
    value = float(struct.unpack("<e" if tensor.dtype == "F16" else "<f", raw)[0])
    if not (math.isfinite(value) and value > 0):
        raise CheckpointError(
            f"{tensor.name} is {value}; wanted a positive number", fix="--kv-cache-dtype auto keeps KV unscaled"
        )
    return value
