"""Scales of an fp8 KV cache are read off the checkpoint, under the names and dtypes in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folder import hf_tensors, prefixed, tiny_config, write_checkpoint

from l4core.errors import CheckpointError, NotBuiltError
from l4core.model.config import ModelConfig
from l4core.model.kv_scales import read_kv_scales
from l4core.model.weights import load_weights

SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": SCHEME}
MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}


def folder_with(path: Path, scales: dict[str, torch.Tensor], quantization: dict[str, Any]) -> ModelConfig:
    config = tiny_config(quantization_config=quantization)
    write_checkpoint(path, prefixed(hf_tensors(config) | scales, wrapped=False))
    return config


@pytest.mark.parametrize("quantization", [COMPRESSED, MODELOPT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_read_whatever_their_name_and_dtype(
    tmp_path: Path, quantization: dict[str, Any], dtype: torch.dtype
) -> None:
    scales = {
        "layers.0.self_attn.k_scale": torch.tensor(0.5, dtype=dtype),
        "layers.0.self_attn.v_scale": torch.tensor([0.25], dtype=dtype),
        "layers.3.self_attn.v_proj.v_scale": torch.tensor(2.0, dtype=dtype),
    }
    config = folder_with(tmp_path, scales, quantization)
    assert read_kv_scales(tmp_path, config) == {0: (0.5, 0.25), 3: (1.0, 2.0)}


def test_weights_beside_them_are_plain(tmp_path: Path) -> None:
    from l4core.model.llama4 import Llama4

    config = folder_with(tmp_path, {"layers.0.self_attn.k_scale": torch.tensor(0.5)}, COMPRESSED)
    model = Llama4(config, max_positions=16)
    load_weights(dict(model.named_parameters()), tmp_path, config, progress=False)


def test_a_checkpoint_without_scales(tmp_path: Path) -> None:
    assert read_kv_scales(tmp_path / "never read", tiny_config()) == {}
    assert read_kv_scales(tmp_path, folder_with(tmp_path, {}, COMPRESSED)) == {}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none(tmp_path: Path, value: float) -> None:
    config = folder_with(tmp_path, {"layers.1.self_attn.k_scale": torch.tensor(value)}, COMPRESSED)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_scale is .*; wanted a positive number"):
        read_kv_scales(tmp_path, config)


@pytest.mark.parametrize("scheme", [SCHEME | {"type": "int"}, SCHEME | {"strategy": "channel"}])
def test_scales_of_another_format(tmp_path: Path, scheme: dict[str, Any]) -> None:
    config = folder_with(tmp_path, {}, COMPRESSED | {"kv_cache_scheme": scheme})
    with pytest.raises(NotBuiltError, match="KV quantised as"):
        read_kv_scales(tmp_path, config)
