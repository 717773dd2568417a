"""EAGLE3 drafts: what each format's config means, and that the published drafts' tensors fit, at full size and on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from l4core.errors import CheckpointError
from l4core.model.eagle3 import Eagle3
from l4core.model.eagle3_config import DraftConfig, Target
from l4core.model.eagle3_weights import DraftPlan, Shape, interleaved, plan_draft
from l4core.model.llama4 import Embedding

SCOUT = MAVERICK = Target(num_layers=48, hidden_size=5120, vocab_size=202_048)
LAYER: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 32_768,
    "num_hidden_layers": 1,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 2048,
}
SPECFORGE = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", **LAYER, "draft_vocab_size": 32_000}
NVIDIA = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama4_text",
    **LAYER,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 32_768,
    "draft_vocab_size": None,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 23, 44], "use_aux_hidden_state": True},
}
SPECULATORS = {
    "architectures": ["Eagle3Speculator"],
    "speculators_model_type": "eagle3",
    "transformer_layer_config": {"model_type": "llama", **LAYER},
    "draft_vocab_size": 64_000,
    "norm_before_residual": False,
    "eagle_aux_hidden_state_layer_ids": [2, 24, 45],
}


def shapes(prefix: str, *, vocab: int, d2t: bool = True, embed: bool = False) -> dict[str, Shape]:
    """A draft of Llama 4's size: 40 and 8 heads of 128, 32,768 wide."""
    found: dict[str, Shape] = {
        "fc.weight": (5120, 15_360),
        "norm.weight": (5120,),
        "lm_head.weight": (vocab, 5120),
        **{f"{prefix}{n}.weight": (5120,) for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")},
        f"{prefix}self_attn.q_proj.weight": (5120, 10_240),
        f"{prefix}self_attn.k_proj.weight": (1024, 10_240),
        f"{prefix}self_attn.v_proj.weight": (1024, 10_240),
        f"{prefix}self_attn.o_proj.weight": (5120, 5120),
        f"{prefix}mlp.gate_proj.weight": (32_768, 5120),
        f"{prefix}mlp.up_proj.weight": (32_768, 5120),
        f"{prefix}mlp.down_proj.weight": (5120, 32_768),
    }
    if d2t:
        found |= {"d2t": (vocab,), "t2d": (202_048,)}
    return found | ({"embed_tokens.weight": (202_048, 5120)} if embed else {})


@pytest.mark.parametrize(
    ("raw", "stored", "layers", "billions"),
    [
        (SPECFORGE, shapes("midlayer.", vocab=32_000), (1, 23, 44), 0.84),
        (NVIDIA, shapes("midlayer.", vocab=202_048, d2t=False), (1, 23, 44), 1.71),
        (NVIDIA, shapes("midlayer.", vocab=202_048, d2t=False, embed=True), (1, 23, 44), 2.75),
        (SPECULATORS, shapes("layers.0.", vocab=64_000, embed=True), (1, 23, 44), 2.04),
    ],
    ids=["SpecForge", "NVIDIA", "NVIDIA with its embedding", "speculators"],
)
def test_published_drafts_fit(
    raw: dict[str, Any], stored: dict[str, Shape], layers: tuple[int, ...], billions: float
) -> None:
    config = DraftConfig.from_dict(raw, target=MAVERICK, options={})
    assert config.aux_layers == layers
    plan = plan_draft(config, MAVERICK, stored)
    with torch.device("meta"):
        embed = None if plan.own_embed else Embedding(202_048, 5120)
        draft = Eagle3(config, layer_id=48, max_positions=8, embed=embed, lm_head=None if plan.own_head else embed)
    assert_filled(draft, plan)
    assert sum(p.numel() for p in draft.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def assert_filled(draft: Eagle3, plan: DraftPlan) -> None:
    """Every row of every parameter has one source: the pieces of a parameter follow one another."""
    rows: dict[str, int] = {}
    tensors = {**dict(draft.named_parameters()), **dict(draft.named_buffers())}
    for piece in plan.pieces:
        assert tuple(tensors[piece.parameter].shape[1:]) == piece.shape[1:]
        rows[piece.parameter] = rows.get(piece.parameter, 0) + piece.shape[0]
    assert {name: rows.get(name) for name, _ in draft.named_parameters()} == {
        name: parameter.shape[0] for name, parameter in draft.named_parameters()
    }


def test_layer_ids_are_outputs_whatever_the_format_counts() -> None:
    """The trap: 1, 23, 44 are outputs in one format, and vLLM reads them as inputs in the other."""

    def layers(raw: dict[str, Any], **options: str) -> tuple[int, ...]:
        return DraftConfig.from_dict(raw, target=MAVERICK, options=options).aux_layers

    ids = {"eagle_aux_hidden_state_layer_ids": [1, 23, 44]}
    assert layers({**SPECFORGE, "eagle_config": ids}) == (1, 23, 44)
    assert layers({**SPECULATORS, **ids}) == (0, 22, 43)
    assert layers({**SPECULATORS, **ids}, aux_layers="1,23,44") == (1, 23, 44)
    del (default := dict(SPECULATORS))["eagle_aux_hidden_state_layer_ids"]
    assert layers(default) == layers(SPECFORGE) == (1, 23, 44)
    with pytest.raises(CheckpointError, match=r"layers 0 to 47, wanted ascending"):
        layers({**SPECULATORS, "eagle_aux_hidden_state_layer_ids": [0, 24, 45]})


def test_a_flag_that_readers_take_differently_must_be_given() -> None:
    del (silent := dict(SPECULATORS))["norm_before_residual"]
    with pytest.raises(CheckpointError, match="no norm_before_residual; readers of this format disagree") as caught:
        DraftConfig.from_dict(silent, target=MAVERICK, options={})
    assert "--speculative-option norm_before_residual=true" in caught.value.fix
    for word, value in (("true", True), ("false", False)):
        options = {"norm_before_residual": word}
        assert DraftConfig.from_dict(silent, target=MAVERICK, options=options).norm_before_residual is value
    assert not DraftConfig.from_dict(SPECFORGE, target=SCOUT, options={}).norm_before_residual


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"midlayer.hidden_norm.weight": None}, "midlayer.hidden_norm.weight [5120] is missing"),
        ({"fc_norm.0.weight": (5120,)}, "fc_norm.0.weight [5120] is in the files, and the config has no place for it"),
        ({"fc.weight": (5120, 10_240)}, "fc.weight is [5120, 10240]; the config makes it [5120, 15360]"),
        ({"d2t": None}, "d2t [32000] is missing"),
        ({"lm_head.weight": None}, "the draft vocabulary of 32000 is not the target's 202048"),
    ],
    ids=["missing", "unknown", "shape", "d2t", "head"],
)
def test_what_does_not_fit_is_named(change: dict[str, Shape | None], words: str) -> None:
    stored = {**shapes("midlayer.", vocab=32_000), **change}
    fitting = {name: shape for name, shape in stored.items() if shape is not None}
    with pytest.raises(CheckpointError) as caught:
        plan_draft(DraftConfig.from_dict(SPECFORGE, target=SCOUT, options={}), SCOUT, fitting)
    assert words in str(caught.value)


def test_another_kind_of_draft_is_refused() -> None:
    for raw in ({"architectures": ["Qwen3ForCausalLM"]}, {**SPECULATORS, "speculators_model_type": "dflash"}):
        with pytest.raises(CheckpointError, match="wanted an EAGLE3 draft"):
            DraftConfig.from_dict(raw, target=SCOUT, options={})


def test_rows_are_interleaved() -> None:
    rows = torch.arange(12).view(12, 1)  # two heads of six rows
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
