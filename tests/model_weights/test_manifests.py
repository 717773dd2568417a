"""The released models' tensors map onto our parameters at full size: nothing missing, nothing unknown, every element used exactly once."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from l4core.model.boxes import Box, tiles, volume
from l4core.model.config import ModelConfig
from l4core.model.llama4 import Llama4
from l4core.model.safetensors_index import StoredTensor
from l4core.model.weight_plan import WeightPlan, plan_weights
from l4core.model.weights import place_of

NAMES = ("scout", "maverick", "maverick-fp8-meta", "maverick-fp8-nvidia", "scout-fp8-nvidia", "scout-text-only")
PLAIN = ("scout", "maverick", "scout-text-only")
TORCH = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}

ReadManifest = Callable[[str], Any]


def test_files_are_what_derive_writes_and_small(derive: ModuleType) -> None:
    folder = Path(derive.HERE)
    written = {name: derive.written(content) for name, content in derive.manifests().items()}
    assert {path.name for path in folder.glob("*.json")} == set(written)
    for name, text in written.items():
        assert (folder / name).read_text() == text
        assert json.loads(text)["derived"] is True
        assert len(text) < 100_000


@pytest.mark.parametrize(
    ("name", "billions", "num_vision"),
    [("scout", 107.8, 554), ("maverick", 400.7, 554), ("maverick-fp8-meta", 400.7, 554), ("scout-text-only", 107.8, 0)],
)
def test_sizes_are_those_of_the_released_models(
    manifest: ReadManifest, name: str, billions: float, num_vision: int
) -> None:
    m = manifest(name)
    plan = plan_weights(m.stored, m.config)
    weights = [t for t in m.stored.values() if t.name in plan.used and not t.name.endswith("_scale")]
    assert round(sum(math.prod(t.shape) for t in weights) / 1e9, 1) == billions
    assert len(plan.vision) == num_vision
    assert len(plan.used) + len(plan.vision) == len(m.stored)


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_copies_every_tensor_once_on_the_meta_device(manifest: ReadManifest, name: str) -> None:
    m = manifest(name)
    plan = plan_weights(m.stored, m.config)
    assert plan.problems == ()
    assert_whole([plan], m.stored)
    with torch.device("meta"):
        for target in plan.targets:
            param = torch.empty(target.shape, dtype=getattr(torch, target.dtype))
            for region in target.regions:
                source = m.stored[region.source]
                full = torch.empty(source.shape or (1,), dtype=TORCH[source.dtype])
                part = full[tuple(slice(a, b) for a, b in region.source_box)]
                assert place_of(param, region).copy_(part).shape == part.shape


@pytest.mark.parametrize("name", NAMES)
def test_eight_ranks_together_copy_every_tensor_once(manifest: ReadManifest, name: str) -> None:
    m = manifest(name)
    assert_whole([plan_weights(m.stored, m.config, rank=rank, world=8) for rank in range(8)], m.stored)


def assert_whole(plans: list[WeightPlan], stored: dict[str, StoredTensor]) -> None:
    """Every parameter of every rank is written exactly once; every used tensor is read exactly once by the ranks together (norms, router
    and scales that no rank cuts: once by each)."""
    read: dict[str, list[Box]] = defaultdict(list)
    for plan in plans:
        assert plan.problems == ()
        names = [target.name for target in plan.targets]
        assert len(names) == len(set(names))
        for target in plan.targets:
            assert tiles([region.target_box for region in target.regions], target.shape), target.name
            for region in target.regions:
                read[region.source].append(region.source_box)
    assert all(set(read) == plan.used - plan.kv_scales for plan in plans)
    for source, boxes in read.items():
        shape = stored[source].shape or (1,)
        uncut = source.endswith(("norm.weight", "router.weight", "_scale")) and boxes == boxes[:1] * len(plans)
        assert tiles(boxes[:1] if uncut else boxes, shape), source


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_names_and_shapes_are_those_of_transformers(manifest: ReadManifest, derive: ModuleType, name: str) -> None:
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    raw = json.loads((Path(derive.HERE) / f"{name}.json").read_text())["config"]
    with torch.device("meta"):
        model = Llama4ForConditionalGeneration(Llama4Config(**raw))
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert theirs == {key: tensor.shape for key, tensor in manifest(name).stored.items()}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("world", [1, 8])
def test_targets_follow_the_contract(manifest: ReadManifest, name: str, world: int) -> None:
    m = manifest(name)
    plan = plan_weights(m.stored, m.config, rank=world - 1, world=world)
    assert {target.name: target.shape for target in plan.targets} == contract(m.config, world)
    assert {target.dtype for target in plan.targets} == {"bfloat16"}


def contract(c: ModelConfig, world: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the model promises, written out from the interface, for one of `world` ranks."""
    h, i, m, d = c.hidden_size, c.intermediate_size // world, c.intermediate_size_mlp // world, c.head_dim
    q, kv, e = c.num_q_heads // world, max(1, c.num_kv_heads // world), c.num_experts
    want = {
        "embed.weight": (c.vocab_size // world, h),
        "norm.weight": (h,),
        "lm_head.weight": (c.vocab_size // world, h),
    }
    for n, moe in enumerate(c.moe_layers):
        at = f"layers.{n}."
        want |= {at + "attn_norm.weight": (h,), at + "mlp_norm.weight": (h,)}
        want |= {at + "attn.qkv.weight": ((q + 2 * kv) * d, h), at + "attn.o.weight": (h, q * d)}
        if moe:
            want |= {at + "moe.router.weight": (e, h)}
            want |= {at + "moe.shared.gate_up.weight": (2 * i, h), at + "moe.shared.down.weight": (h, i)}
            want |= {at + "moe.experts.gate_up": (e, h, 2 * i), at + "moe.experts.down": (e, i, h)}
        else:
            want |= {at + "mlp.gate_up.weight": (2 * m, h), at + "mlp.down.weight": (h, m)}
    return want


def test_quantised_targets(manifest: ReadManifest) -> None:
    meta, nvidia = manifest("maverick-fp8-meta"), manifest("maverick-fp8-nvidia")
    targets = {t.name: (t.shape, t.dtype) for t in plan_weights(meta.stored, meta.config, world=8).targets}
    assert targets["layers.1.moe.experts.gate_up"] == ((128, 5120, 2048), "float8_e4m3fn")
    assert targets["layers.1.moe.experts.gate_up_weight_scale"] == ((128, 2048, 1), "float32")
    assert targets["layers.1.moe.experts.down_weight_scale"] == ((128, 5120, 1), "float32")
    assert targets["layers.1.moe.shared.down.weight"] == ((5120, 1024), "bfloat16")
    assert targets["layers.1.attn.qkv.weight"] == ((896, 5120), "bfloat16")
    targets = {t.name: (t.shape, t.dtype) for t in plan_weights(nvidia.stored, nvidia.config, world=8).targets}
    assert targets["layers.1.moe.experts.gate_up"] == ((128, 5120, 2048), "float8_e4m3fn")
    assert targets["layers.1.moe.experts.gate_up_weight_scale"] == ((1,), "float32")
    assert targets["layers.1.moe.experts.gate_up_input_scale"] == ((1,), "float32")
    assert targets["layers.1.attn.qkv.weight"] == ((896, 5120), "float8_e4m3fn")
    assert targets["layers.1.attn.qkv.weight_scale"] == ((3,), "float32")
    assert targets["layers.0.mlp.gate_up.input_scale"] == ((2,), "float32")


def test_bytes_of_a_rank(manifest: ReadManifest) -> None:
    """Published sizes: BF16 at TP 8, about 27 GB a rank for Scout, 100 GB for Maverick, half of that in FP8."""
    sizes = {}
    for name in NAMES:
        m = manifest(name)
        sizes[name] = round(plan_weights(m.stored, m.config, world=8).num_bytes / 1e9)
    assert sizes["scout"] == sizes["scout-text-only"] == 27
    assert sizes["maverick"] == 100
    assert sizes["maverick-fp8-meta"] == 52
    assert sizes["maverick-fp8-nvidia"] == 50


def test_one_rank_reads_each_plain_tensor_in_one_run(manifest: ReadManifest) -> None:
    """Fused gate and up lie side by side at world 1: one copy of the whole tensor, not two of strided halves."""
    m = manifest("scout")
    plan = plan_weights(m.stored, m.config)
    assert sum(len(target.regions) for target in plan.targets) == len(plan.used - plan.kv_scales)


def test_volume_of_all_regions_is_what_a_rank_needs(manifest: ReadManifest) -> None:
    m = manifest("maverick")
    plan = plan_weights(m.stored, m.config, rank=5, world=8)
    read = sum(volume(region.source_box) for target in plan.targets for region in target.regions) * 2
    assert read == plan.num_bytes


@pytest.mark.parametrize("name", PLAIN)
def test_the_model_has_exactly_the_parameters_of_the_plan(manifest: ReadManifest, name: str) -> None:
    m = manifest(name)
    with torch.device("meta"):
        model = Llama4(m.config, max_positions=64)
    theirs = {key: tuple(param.shape) for key, param in model.named_parameters()}
    assert theirs == {target.name: target.shape for target in plan_weights(m.stored, m.config).targets}
