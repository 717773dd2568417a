"""Quantised layouts: what is quantised is read off the scales; what does not add up is a named problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folder import Tensors, as_stored, hf_tensors, prefixed, tiny_config

from l4core.errors import CheckpointError, NotBuiltError
from l4core.model.layout_quant import scheme_of, with_folder_scheme
from l4core.model.weight_plan import WeightPlan, plan_weights

MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
F8 = torch.float8_e4m3fn
Q1 = "layers.1.self_attn.q_proj."


def channel_fp8(strategy: str = "channel", bits: int = 8, kind: str = "float") -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


def experts_fp8(layers: tuple[int, ...] = (1, 3)) -> Tensors:
    """Per-expert FP8 with channel scales in the given layers, everything else plain."""
    tensors = hf_tensors(tiny_config(), one_each=True)
    for name in [n for n in tensors if ".experts." in n and int(n.split(".")[1]) in layers]:
        tensors[name] = tensors[name].to(F8)
        tensors[name.removesuffix("weight") + "weight_scale"] = torch.ones(len(tensors[name]), 1)
    return tensors


def plan(tensors: Tensors, quantization: dict[str, Any] | None, **shard: int) -> WeightPlan:
    stored = as_stored(prefixed(tensors, wrapped=False))
    return plan_weights(stored, tiny_config(quantization_config=quantization), **shard)


@pytest.mark.parametrize(
    ("quantization", "scheme"),
    [
        (None, None),
        ({}, None),
        (MODELOPT, "ModelOpt FP8"),
        ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "ModelOpt FP8"),
        (channel_fp8(), "compressed-tensors FP8"),
        (channel_fp8("tensor"), "compressed-tensors FP8"),
        ({"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}}, None),
        ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}, None),
    ],
)
def test_schemes_that_are_mapped(quantization: dict[str, Any] | None, scheme: str | None) -> None:
    assert scheme_of(quantization) == scheme


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"modelopt \(NVFP4\)"),
        (channel_fp8(bits=4, kind="int"), r"compressed-tensors \(4-bit int, channel\)"),
        (channel_fp8(strategy="block"), r"compressed-tensors \(8-bit float, block\)"),
        ({"quant_method": "gptq", "bits": 4}, r"gptq \(4\)"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8,"),
        ({"unheard": 1}, "unnamed,"),
    ],
)
def test_other_schemes_are_refused_by_name(quantization: dict[str, Any], named: str) -> None:
    with pytest.raises(NotBuiltError, match=f"^the weights are quantised with {named}"):
        scheme_of(quantization)


def test_a_layer_left_unquantised_is_mapped_as_it_is() -> None:
    made = plan(experts_fp8(layers=(1,)), channel_fp8())
    assert made.problems == ()
    dtypes = {target.name: target.dtype for target in made.targets}
    assert dtypes["layers.1.moe.experts.down"] == "float8_e4m3fn"
    assert dtypes["layers.3.moe.experts.down"] == "float32"
    assert "layers.3.moe.experts.down_weight_scale" not in dtypes


def test_channel_scales_are_cut_where_their_rows_are() -> None:
    made = {target.name: target for target in plan(experts_fp8(), channel_fp8(), rank=3, world=8).targets}
    gate_up, down = made["layers.1.moe.experts.gate_up_weight_scale"], made["layers.1.moe.experts.down_weight_scale"]
    assert gate_up.shape == (3, 6, 1)
    assert down.shape == (3, 16, 1)
    of_expert_2 = [(r.source_box, r.target_box) for r in gate_up.regions if ".experts.2." in r.source]
    assert of_expert_2 == [
        (((9, 12), (0, 1)), ((2, 3), (0, 3), (0, 1))),
        (((9, 12), (0, 1)), ((2, 3), (3, 6), (0, 1))),
    ]
    assert [r.source_box for r in down.regions] == [((0, 16), (0, 1))] * 3


def test_one_scale_a_tensor_and_expert() -> None:
    tensors = experts_fp8()
    for name in [n for n in tensors if n.endswith("weight_scale")]:
        tensors[name] = torch.ones(())
        tensors[name.replace("weight_scale", "input_scale")] = torch.ones(1)
    made = plan(tensors, channel_fp8("tensor"))
    assert made.problems == ()
    shapes = {target.name: target.shape for target in made.targets}
    assert shapes["layers.1.moe.experts.gate_up_weight_scale"] == (3, 2)
    assert shapes["layers.1.moe.experts.gate_up_input_scale"] == (3, 2)
    assert shapes["layers.1.moe.experts.down_weight_scale"] == (3, 1)


@pytest.mark.parametrize("names", [("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"), ("self_attn.k_scale",)])
def test_scales_of_the_cache(names: tuple[str, ...]) -> None:
    tensors = experts_fp8() | {f"layers.2.{name}": torch.ones(()) for name in names}
    made = plan(tensors, channel_fp8())
    assert made.problems == ()
    assert made.kv_scales == {f"model.layers.2.{name}" for name in names} <= made.used
    assert not any(target.name.endswith(("k_scale", "v_scale")) for target in made.targets), "they are KV memory's"


def texts(made: WeightPlan) -> str:
    return "\n".join(problem.text for problem in made.problems)


def test_fp8_without_a_scale() -> None:
    tensors = hf_tensors(tiny_config())
    tensors[Q1 + "weight"] = tensors[Q1 + "weight"].to(F8)
    found = texts(plan(tensors, MODELOPT))
    assert f"model.{Q1}weight_scale is missing: model.{Q1}weight is FP8 and has no scale" in found


def test_one_of_three_scales_missing() -> None:
    tensors = hf_tensors(tiny_config())
    for x in "qkv":
        at = f"layers.1.self_attn.{x}_proj."
        tensors[at + "weight"] = tensors[at + "weight"].to(F8)
        tensors[at + "weight_scale"] = torch.ones(())
    assert plan(tensors, MODELOPT).problems == ()
    del tensors["layers.1.self_attn.v_proj.weight_scale"]
    assert texts(plan(tensors, MODELOPT)) == "model.layers.1.self_attn.v_proj.weight_scale is missing; wanted [1]"


def test_a_scale_of_a_weight_that_is_not_fp8() -> None:
    tensors = hf_tensors(tiny_config()) | {"layers.1.self_attn.o_proj.weight_scale": torch.ones(())}
    assert texts(plan(tensors, MODELOPT)) == "model.layers.1.self_attn.o_proj.weight is F32; wanted F8_E4M3"


def test_an_input_scale_alone() -> None:
    tensors = hf_tensors(tiny_config()) | {"layers.1.self_attn.o_proj.input_scale": torch.ones(())}
    tensors["layers.1.self_attn.o_proj.weight"] = tensors["layers.1.self_attn.o_proj.weight"].to(F8)
    assert "layers.1.self_attn.o_proj.weight_scale is missing" in texts(plan(tensors, MODELOPT))


def test_block_scales_are_of_the_wrong_shape() -> None:
    tensors = experts_fp8()
    name = "layers.1.feed_forward.experts.0.down_proj.weight_scale"
    tensors[name] = torch.ones(2, 3)
    assert texts(plan(tensors, channel_fp8())) == f"model.{name} is [2, 3]; wanted [16, 1]"


def test_scales_without_a_scheme_in_the_config() -> None:
    found = texts(plan(experts_fp8(), None))
    assert "experts.0.down_proj.weight is F8_E4M3; wanted BF16 or F16 or F32" in found
    assert (
        "down_proj.weight_scale is no weight of this model (a scale, but config.json has no quantization_config)"
        in found
    )


def test_a_scheme_without_any_scale() -> None:
    found = texts(plan(hf_tensors(tiny_config()), MODELOPT))
    assert found == "config.json says ModelOpt FP8, but no tensor of the checkpoint has a scale"


def test_tensors_of_a_fp4_export_are_unknown_by_name() -> None:
    tensors = experts_fp8() | {"layers.1.feed_forward.experts.0.down_proj.weight_scale_2": torch.ones(())}
    assert "experts.0.down_proj.weight_scale_2 is no weight of this model" in texts(plan(tensors, channel_fp8()))


def test_a_dtype_that_none_computes_in() -> None:
    config = tiny_config(dtype="int8")
    with pytest.raises(CheckpointError, match="dtype is 'int8'; wanted float32 or bfloat16 or float16"):
        plan_weights(as_stored(prefixed(hf_tensors(config), wrapped=False)), config)


@pytest.mark.parametrize(("text", "match"), [("{", "is not valid JSON"), ("[]", "holds a list; wanted an object")])
def test_a_damaged_hf_quant_config(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "hf_quant_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=match):
        with_folder_scheme(tiny_config(), tmp_path)
