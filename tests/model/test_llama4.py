"""The model against transformers in float32 and against the definition in float64, through paged KV with shuffled and poisoned pages."""

from __future__ import annotations

import pytest
import torch

from l4core.model.config import ModelConfig
from l4core.model.llama4 import Llama4
from model.definition import logits_of
from model.harness import Harness, ours

TOLERANCE = 1e-4
VARIANTS = {
    "every_layer_moe": {},
    "dense_interleaved": {"step": 2},
    "no_qk_norm_scaled_rope": {"step": 2, "qk_norm": False, "scaled_rope": True},
    "scaled_rope_tied": {"scaled_rope": True, "tie": True},
}


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert theirs.std() > 0.5, "flat logits would hide wrong attention"
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_prefill_equals_transformers(case, variant: str) -> None:
    c = case(**VARIANTS[variant])
    out = Harness(c.model(), page_size=64).prefill(c.prompt(310))
    assert difference(out, c.logits(310)) <= TOLERANCE


@pytest.mark.parametrize("backend", ["sdpa", "padded"])
@pytest.mark.parametrize("page_size", [1, 16, 32, 64])
def test_page_sizes(case, backend: str, page_size: int) -> None:
    c = case()
    out = Harness(c.model(), backend, page_size=page_size).prefill(c.prompt(310))
    assert difference(out, c.logits(310)) <= TOLERANCE


@pytest.mark.parametrize("page_size", [1, 16, 32, 64])
def test_reference_backend(small, page_size: int) -> None:
    c = small()
    out = Harness(c.model(), "reference", page_size=page_size).prefill(c.prompt(150))
    assert difference(out, c.logits(150)) <= TOLERANCE


@pytest.mark.parametrize("size", [7, 17, 33, 51, 63])
def test_chunked_prefill(case, size: int) -> None:
    c = case(step=2)
    out = Harness(c.model()).prefill(c.prompt(310), size)
    assert difference(out, c.logits(310)) <= TOLERANCE


@pytest.mark.parametrize("backend", ["sdpa", "reference", "padded"])
@pytest.mark.parametrize("variant", ["every_layer_moe", "no_qk_norm_scaled_rope"])
def test_decode(small, variant: str, backend: str) -> None:
    """A prompt that ends inside a chunk, then one token at a time over two borders."""
    c = small(**VARIANTS[variant])
    ids, harness = c.prompt(150), Harness(c.model(), backend)
    pieces = [harness.prefill(ids[:50]), *(harness.step({0: [token]})[0] for token in ids[50:])]
    assert difference(torch.cat(pieces), c.logits(150)) <= TOLERANCE


@pytest.mark.parametrize("backend", ["sdpa", "padded"])
def test_sixteen_mixed_sequences_get_what_each_gets_alone(small, backend: str) -> None:
    """Decodes and prefill pieces of one step, lengths around the chunk borders: equal to transformers on each sequence alone."""
    c = small(scaled_rope=True)
    lengths = [1, 2, 5, 31, 62, 63, 64, 65, 66, 96, 127, 128, 129, 130, 140, 150]
    ids, theirs, harness = c.prompt(160), c.logits(160), Harness(c.model(), backend, num_seqs=16)
    for seq, length in enumerate(lengths):
        harness.prefill(ids[:length], seq=seq)
    pieces = {seq: ids[n : n + (1 if seq % 3 else min(9, 64 - n % 64))] for seq, n in enumerate(lengths)}
    for seq, out in harness.step(pieces).items():
        begin = lengths[seq]
        assert difference(out, theirs[begin : begin + len(out)]) <= TOLERANCE
    again = {seq: [ids[harness.lens[seq]]] for seq in pieces}
    for seq, out in harness.step(again).items():
        assert difference(out, theirs[harness.lens[seq] - 1 : harness.lens[seq]]) <= TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_equals_the_definition(small, variant: str) -> None:
    """The second oracle: the whole model in float64 on the reference backend; float32 hides nothing at this precision."""
    c = small(**VARIANTS[variant])
    ids = c.prompt(140)
    harness = Harness(c.model(torch.float64), "reference")
    out = torch.cat([harness.prefill(ids[:100], 37), *(harness.step({0: [token]})[0] for token in ids[100:])])
    assert out.dtype == torch.float64
    assert difference(out, logits_of(c.hf.config, c.hf.state_dict(), ids)) <= 1e-10


def test_far_positions_in_float64_equal_the_definition(small) -> None:
    """RoPE by p mod chunk and the temperature at lengths where float32 RoPE by p is no longer exact."""
    c = small(chunk=16, floor_scale=16)
    ids = c.prompt(600)
    out = Harness(c.model(torch.float64), "sdpa", page_size=16, max_len=640).prefill(ids)
    assert difference(out, logits_of(c.hf.config, c.hf.state_dict(), ids)) <= 1e-10


def test_a_vision_checkpoints_text_half_equals_transformers() -> None:
    from l4core.testing.models.checkpoints import random_model, text_config
    from model.conftest import SMALL, prompt_of

    hf, ids = random_model(text_config(**SMALL), vision=True), prompt_of(100)
    theirs = hf.language_model(torch.tensor([ids]), use_cache=False).logits[0]
    model = ours(hf)
    assert model.config.has_vision
    assert difference(Harness(model).prefill(ids), theirs) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_float32(small, dtype: torch.dtype) -> None:
    """A flipped router choice is a large isolated difference, so the median is bounded, not the maximum."""
    c = small(experts=1)
    out = Harness(c.model(dtype)).prefill(c.prompt(150), 50)
    assert out.dtype == torch.float32
    assert (out - c.logits(150)).abs().median() < 0.05


def test_thin_products_on_every_processor(case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their transposed results flow through the whole model, also where this processor would not choose them."""
    monkeypatch.setattr("l4core.ops.linear.THIN", range(1, 65))
    monkeypatch.setattr("l4core.ops.linear._num_threads", lambda: 2)
    c = case(step=2)
    harness = Harness(c.model(), num_seqs=3)
    pieces = [harness.prefill(c.prompt(75), 33, seq) for seq in range(3)][0:1]
    for token in c.prompt(90)[75:85]:
        pieces.append(harness.step({0: [token], 1: [token], 2: [token]})[0])
    for token in c.prompt(90)[85:]:
        pieces.append(harness.step({0: [token]})[0])
    assert difference(torch.cat(pieces), c.logits(90)) <= TOLERANCE


def test_chosen_layers_hand_out_the_residual_stream_behind_them(small) -> None:
    """transformers' hidden_states[i + 1] is the output of layer i."""
    c = small(step=2)
    ids, layers = c.prompt(60), (2, 0, 1)
    theirs = c.hf(torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states
    harness = Harness(ours(c.hf, aux_layers=layers))
    logits = [harness.prefill(ids[:50])]
    found = [harness.aux]
    for token in ids[50:]:
        logits.append(harness.step({0: [token]})[0])
        found.append(harness.aux)
    assert difference(torch.cat(found), torch.cat([theirs[i + 1][0] for i in layers], dim=-1)) <= TOLERANCE
    assert difference(torch.cat(logits), c.logits(60)) <= TOLERANCE


def test_names_and_shapes_are_the_ones_the_loader_fills() -> None:
    config = ModelConfig.from_dict(
        {
            "architectures": ["Llama4ForCausalLM"],
            "vocab_size": 50,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "intermediate_size": 10,
            "intermediate_size_mlp": 14,
            "num_local_experts": 3,
            "interleave_moe_layer_step": 2,
            "max_position_embeddings": 64,
        }
    )
    with torch.device("meta"):
        found = {name: tuple(p.shape) for name, p in Llama4(config, max_positions=64).named_parameters()}
    assert found == {
        "embed.weight": (50, 16),
        "layers.0.attn_norm.weight": (16,),
        "layers.0.attn.qkv.weight": (48, 16),
        "layers.0.attn.o.weight": (16, 24),
        "layers.0.mlp_norm.weight": (16,),
        "layers.0.mlp.gate_up.weight": (28, 16),
        "layers.0.mlp.down.weight": (16, 14),
        "layers.1.attn_norm.weight": (16,),
        "layers.1.attn.qkv.weight": (48, 16),
        "layers.1.attn.o.weight": (16, 24),
        "layers.1.mlp_norm.weight": (16,),
        "layers.1.moe.router.weight": (3, 16),
        "layers.1.moe.shared.gate_up.weight": (20, 16),
        "layers.1.moe.shared.down.weight": (16, 10),
        "layers.1.moe.experts.gate_up": (3, 16, 20),
        "layers.1.moe.experts.down": (3, 10, 16),
        "norm.weight": (16,),
        "lm_head.weight": (50, 16),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_accelerators_step_reads_nothing_back(small, dtype: torch.dtype) -> None:
    """On the meta device every read of a value raises, so a forward that passes has no host sync: prefill and decode, plan and attend."""
    from model.harness import meta_step

    config = small().model().config
    with torch.device("meta"):
        model = Llama4(config, max_positions=64).to(dtype)
    for counts in ([3, 7, 2], [1, 1]):
        assert meta_step(model, counts).shape == (sum(counts), 256)


def test_two_models_share_nothing(small) -> None:
    a, b = small(), small(chunk=32)
    first, second = Harness(a.model()), Harness(b.model())
    out_a = [first.prefill(a.prompt(60))]
    out_b = [second.prefill(b.prompt(60))]
    for token in a.prompt(100)[60:]:
        out_a.append(first.step({0: [token]})[0])
        out_b.append(second.step({0: [token]})[0])
    assert difference(torch.cat(out_a), a.logits(100)) <= TOLERANCE
    assert difference(torch.cat(out_b), b.logits(100)) <= TOLERANCE
