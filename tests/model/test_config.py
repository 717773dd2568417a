from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Llama4TextConfig

from l4core.errors import CheckpointError
from l4core.kv.blocks import KVGroup
from l4core.kv.superpages import superpage_shape
from l4core.model.config import ModelConfig, RopeScaling
from l4core.testing.models.checkpoints import text_config

SCOUT: dict[str, Any] = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1408},
    "text_config": {
        "vocab_size": 202048,
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "max_position_embeddings": 10485760,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": 4,
        "no_rope_layers": [],
        "bos_token_id": 200000,
        "eos_token_id": [200001, 200007, 200008],
    },
}


def tiny(**changes: Any) -> dict[str, Any]:
    return (
        text_config().to_dict()
        | {"architectures": ["Llama4ForCausalLM"], "layer_types": None, "moe_layers": None, "no_rope_layers": None}
        | changes
    )


def parse(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(tiny(**changes))


def test_scout() -> None:
    config = ModelConfig.from_dict(SCOUT)
    assert config.has_vision
    assert config.dtype == "bfloat16"
    assert config.rope_scaling == RopeScaling(
        factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=8192
    )
    assert config.rope_theta == 500000.0
    assert config.attn_temperature_tuning is True
    assert (config.floor_scale, config.attn_scale) == (8192, 0.1)
    assert all(config.moe_layers)
    assert config.eos_token_ids == (200001, 200007, 200008)
    full = tuple(range(3, 48, 4))
    assert config.kv_groups() == (
        KVGroup(name="global", layer_ids=full, chunk_size=None),
        KVGroup(name="local", layer_ids=tuple(i for i in range(48) if i not in full), chunk_size=8192),
    )


def test_a_drafts_layers_are_stored_beside_the_global_ones() -> None:
    full, local = ModelConfig.from_dict(SCOUT).kv_groups(num_draft_layers=1)
    assert full.layer_ids == (*range(3, 48, 4), 48)
    assert (full.chunk_size, len(local.layer_ids)) == (None, 36)
    assert superpage_shape([full, local]).pages == {"global": 3, "local": 1}
    alone = parse(no_rope_layers=[1] * 8).kv_groups(num_draft_layers=1)
    assert [(g.name, g.layer_ids[-1]) for g in alone] == [("global", 8), ("local", 7)]


def test_maverick_alternates_dense_and_moe() -> None:
    text = SCOUT["text_config"] | {
        "num_local_experts": 128,
        "interleave_moe_layer_step": 2,
        "use_qk_norm": False,
        "rope_scaling": None,
    }
    text.pop("attn_temperature_tuning")
    config = ModelConfig.from_dict(SCOUT | {"text_config": text})
    assert config.moe_layers == (False, True) * 24
    assert config.rope_scaling is None
    assert not config.use_qk_norm
    assert config.attn_temperature_tuning  # absent from early uploads; on by default


@pytest.mark.parametrize("listed", [None, []])
def test_no_list_means_the_interval(listed: list[int] | None) -> None:
    assert parse(no_rope_layers=listed).rope_layers == (True, True, True, False) * 2
    assert parse(no_rope_layers=listed, no_rope_layer_interval=2).rope_layers == (True, False) * 4


def test_lists_replace_intervals() -> None:
    config = parse(no_rope_layers=[0, 1, 1, 1, 1, 1, 1, 0], moe_layers=[2, 5], interleave_moe_layer_step=1)
    assert config.rope_layers == (False, *[True] * 6, False)
    assert config.chunked_layers == config.rope_layers
    assert [i for i, moe in enumerate(config.moe_layers) if moe] == [2, 5]


def test_layer_types_decide_who_is_chunked() -> None:
    config = parse(layer_types=["full_attention"] * 7 + ["chunked_attention"])
    assert config.chunked_layers == (*[False] * 7, True)
    assert config.rope_layers == (True, True, True, False) * 2


def test_without_a_chunk_all_layers_are_global() -> None:
    config = parse(attention_chunk_size=None)
    assert [g.name for g in config.kv_groups()] == ["global"]


def test_all_layers_local() -> None:
    assert [g.name for g in parse(no_rope_layers=[1] * 8).kv_groups()] == ["local"]


def test_rope_in_the_new_spelling() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = parse(rope_parameters={"rope_theta": 1e4, "rope_type": "llama3", **scaling})
    assert config.rope_theta == 1e4
    assert config.rope_scaling == RopeScaling(**scaling)


@pytest.mark.parametrize("old", [None, {}, {"rope_type": "llama3", "factor": 4.0}, {"rope_type": "default"}])
@pytest.mark.parametrize(
    "new", [None, {"rope_theta": 1e4, "rope_type": "default"}, {"rope_type": "llama3", "factor": 8.0}]
)
def test_of_both_spellings_the_one_that_transformers_takes(
    old: dict[str, Any] | None, new: dict[str, Any] | None
) -> None:
    rest = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old, new = ({**given, **rest} if given and given["rope_type"] == "llama3" else given for given in (old, new))
    keys = {"rope_theta": 3e5, "rope_scaling": old, "rope_parameters": new}
    given = {name: value for name, value in tiny().items() if name not in keys}
    theirs = Llama4TextConfig(**json.loads(json.dumps(given | keys))).rope_parameters
    config = ModelConfig.from_dict(given | keys)
    assert config.rope_theta == theirs["rope_theta"]
    assert (config.rope_scaling.factor if config.rope_scaling else None) == theirs.get("factor")


def test_old_type_key() -> None:
    config = parse(rope_parameters=None, rope_theta=3e5, rope_scaling={"type": "default"})
    assert (config.rope_theta, config.rope_scaling) == (3e5, None)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "float16"}, "float16"),
        ({"dtype": "torch.float32"}, "float32"),
        ({"dtype": None}, "float32"),
    ],
)
def test_dtype(changes: dict[str, Any], found: str) -> None:
    assert parse(**changes).dtype == found


def test_single_eos_id_and_no_bos() -> None:
    config = parse(eos_token_id=7, bos_token_id=None)
    assert (config.eos_token_ids, config.bos_token_id) == ((7,), None)


def test_quantization_and_tied_head_are_seen() -> None:
    config = parse(quantization_config={"quant_method": "compressed-tensors"}, tie_word_embeddings=True)
    assert config.quantization_config == {"quant_method": "compressed-tensors"}
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, ["architectures", "LlamaForCausalLM", "Llama4ForCausalLM"]),
        ({"architectures": None}, ["architectures", "None"]),
        ({"hidden_size": None}, ["hidden_size", "None", "at least 1"]),
        ({"num_hidden_layers": "8"}, ["num_hidden_layers", "'8'"]),
        ({"vocab_size": True}, ["vocab_size", "True"]),
        ({"num_experts_per_tok": 2}, ["num_experts_per_tok is 2", "wanted 1", "input"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads is 3", "divisor", "8"]),
        ({"head_dim": 31}, ["head_dim", "even"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"attention_bias": True}, ["attention_bias", "False", "biases"]),
        ({"no_rope_layers": [1, 1]}, ["no_rope_layers", "at least 8"]),
        ({"no_rope_layers": [2] * 8}, ["no_rope_layers", "0 or 1"]),
        ({"no_rope_layers": "none"}, ["no_rope_layers", "list"]),
        ({"layer_types": ["sliding_attention"] * 8}, ["layer_types", "chunked_attention"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "8 entries"]),
        (
            {"layer_types": ["chunked_attention"] * 8, "attention_chunk_size": None},
            ["attention_chunk_size is None", "layer_types"],
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters.rope_type", "'yarn'", "'llama3'"]),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["rope_parameters.factor is missing"]),
        ({"rope_parameters": 4}, ["rope_parameters", "object"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps", "above 0"]),
        ({"use_qk_norm": "yes"}, ["use_qk_norm", "true or false"]),
        ({"eos_token_id": "x"}, ["token id", "'x'"]),
    ],
)
def test_a_wrong_key_is_named_with_what_was_wanted(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(**changes)
    for word in words:
        assert word.lower() in str(caught.value).lower()


def test_a_missing_key_is_named_with_its_place() -> None:
    text = {k: v for k, v in SCOUT["text_config"].items() if k != "num_local_experts"}
    with pytest.raises(CheckpointError, match=r"text_config\.num_local_experts is missing"):
        ModelConfig.from_dict(SCOUT | {"text_config": text})
    with pytest.raises(CheckpointError, match="text_config is None"):
        ModelConfig.from_dict({"architectures": ["Llama4ForConditionalGeneration"]})


def test_dense_layers_need_their_size() -> None:
    raw = tiny(interleave_moe_layer_step=2)
    del raw["intermediate_size_mlp"]
    with pytest.raises(CheckpointError, match="intermediate_size_mlp is missing"):
        ModelConfig.from_dict(raw)


def test_generation_config_has_the_last_word_on_eos(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny(eos_token_id=5)))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (6, 7)
    (tmp_path / "generation_config.json").write_text("{}")
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (5,)


@pytest.mark.parametrize(
    ("text", "word"), [(None, "does not exist"), ("{", "not valid JSON"), ("[]", "wanted an object")]
)
def test_an_unreadable_config_is_an_error(tmp_path: Path, text: str | None, word: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=word):
        ModelConfig.from_folder(tmp_path)


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    text_config(step=2, no_rope_layers=[0, 1, 1, 1, 1, 1, 1, 1], qk_norm=False).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": ["Llama4ForCausalLM"]}))
    config = ModelConfig.from_folder(tmp_path)
    assert config.moe_layers == (False, True) * 4
    assert config.rope_layers == (False, *[True] * 7)
    assert config.attention_chunk_size == 64
    assert not config.use_qk_norm
