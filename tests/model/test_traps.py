"""Every place where a Llama 4 can be almost right. Each test here fails when its trap is built back in (done once, by hand, for each)."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from l4core.model.moe import MoE
from l4core.testing.models.checkpoints import random_model
from model.harness import Harness, ours

LENGTH = 150  # over two borders of the chunk of 64
TOLERANCE = 1e-4
LOUD = 1e-2


def error(c, length: int = LENGTH, **config_keys: object) -> float:
    model = ours(c.hf, **config_keys)
    return float((Harness(model).prefill(c.prompt(length), 50) - c.logits(length)).abs().max())


def test_rope_turns_interleaved_pairs(small) -> None:
    """No QK norm, so nothing evens out a pairing of halves."""
    assert error(small(qk_norm=False)) <= TOLERANCE


def test_rope_of_a_full_attention_layer_uses_absolute_positions(small) -> None:
    """chunk None: RoPE layers see everything and positions are not taken mod anything."""
    assert error(small(chunk=None)) <= TOLERANCE


def test_rope_of_a_chunked_layer_next_to_a_full_one(small) -> None:
    """layer_types makes RoPE layer 1 global: it takes absolute angles while its neighbours take p mod chunk."""
    c = small()
    config = c.hf.config.__class__(
        **{**c.hf.config.to_dict(), "layer_types": ["chunked_attention", *["full_attention"] * 3]}
    )
    hf = random_model(config)
    theirs = hf(torch.tensor([c.prompt(LENGTH)]), use_cache=False).logits[0]
    assert (Harness(ours(hf)).prefill(c.prompt(LENGTH)) - theirs).abs().max() <= TOLERANCE


def test_qk_norm_has_the_configs_eps(small) -> None:
    assert error(small(rms_norm_eps=0.05)) <= TOLERANCE


def test_qk_norm_leaves_layers_without_rope_alone(small) -> None:
    assert error(small(no_rope_layers=[0, 1, 0, 0])) <= TOLERANCE


def test_qk_norm_off(small) -> None:
    c = small(qk_norm=False)
    assert not c.model().config.use_qk_norm
    assert error(c) <= TOLERANCE


def test_router_weight_scales_the_experts_input() -> None:
    """One token, one expert, by hand: SwiGLU(s·x), not s·SwiGLU(x); and the two differ."""
    config = ours_config(experts=3)
    moe, x = filled(MoE(config)), torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    out = moe(x)
    for t in range(5):
        logits = x[t] @ moe.router.weight.T
        s, e = logits.max().sigmoid(), int(logits.argmax())
        shared = swiglu(x[t], moe.shared.gate_up.weight.T, moe.shared.down.weight.T)
        on_input = swiglu(s * x[t], moe.experts.gate_up[e], moe.experts.down[e])
        on_output = s * swiglu(x[t], moe.experts.gate_up[e], moe.experts.down[e])
        torch.testing.assert_close(out[t], shared + on_input, atol=1e-5, rtol=1e-5)
        assert (on_input - on_output).abs().max() > LOUD


def test_shared_expert_is_added_unscaled() -> None:
    """With routed experts of zero weights the layer is its shared expert."""
    moe = filled(MoE(ours_config(experts=3)))
    moe.experts.down.zero_()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        moe(x), swiglu(x, moe.shared.gate_up.weight.T, moe.shared.down.weight.T), atol=1e-5, rtol=1e-5
    )


def test_chunk_is_counted_from_absolute_positions(small) -> None:
    """Pieces that start inside a chunk: neither a window of `chunk` tokens nor chunks counted from the piece's start give these logits."""
    c, ids = small(), small().prompt(LENGTH)
    harness = Harness(c.model())
    pieces = [harness.prefill(ids[:40], 40), harness.prefill(ids[40:110], 30), harness.prefill(ids[110:], 23)]
    assert (torch.cat(pieces) - c.logits(LENGTH)).abs().max() <= TOLERANCE


def test_a_token_alone_behind_a_border(small) -> None:
    """As a decode meets it: a piece that ends with the very first token of a chunk."""
    c, ids = small(), small().prompt(130)
    harness = Harness(c.model())
    ends = [0, 64, 65, 66, 128, 129, 130]
    pieces = [harness.prefill(ids[a:b]) for a, b in itertools.pairwise(ends)]
    assert (torch.cat(pieces) - c.logits(130)).abs().max() <= TOLERANCE


def test_first_token_of_a_chunk_sees_only_itself(small) -> None:
    """All layers local: what follows a border does not depend on what stands before it."""
    c = small(no_rope_layers=[1, 1, 1, 1])
    ids = c.prompt(LENGTH)
    other = [(t + 1) % 256 for t in ids[:64]] + ids[64:]
    a, b = Harness(c.model()).prefill(ids), Harness(c.model()).prefill(other)
    assert (a[:64] - b[:64]).abs().max() > LOUD
    torch.testing.assert_close(a[64:], b[64:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("floor_scale", [8, 30, 64])
def test_temperature_of_layers_without_rope(small, floor_scale: int) -> None:
    c, off = small(floor_scale=floor_scale), small(temperature=False)
    assert error(c) <= TOLERANCE
    assert error(off) <= TOLERANCE
    assert (c.logits(LENGTH)[: floor_scale - 1] - off.logits(LENGTH)[: floor_scale - 1]).abs().max() < 1e-5
    assert (c.logits(LENGTH)[floor_scale - 1 :] - off.logits(LENGTH)[floor_scale - 1 :]).abs().max() > LOUD


@pytest.mark.parametrize("listed", [[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]])
def test_explicit_list_of_layers_without_rope(small, listed: list[int]) -> None:
    c = small(no_rope_layers=listed)
    assert c.model().config.rope_layers == tuple(map(bool, listed))
    assert error(c) <= TOLERANCE


@pytest.mark.parametrize("interval", [2, 3, 4])
@pytest.mark.parametrize("listed", [None, []])
def test_interval_of_layers_without_rope(small, interval: int, listed: list[int] | None) -> None:
    """transformers writes the list out; a config with an empty one, or none, is the same model."""
    c = small(no_rope_interval=interval)
    assert error(c, no_rope_layers=listed, layer_types=None) <= TOLERANCE


def test_scaled_rope(small) -> None:
    c, plain = small(scaled_rope=True), small()
    assert error(c) <= TOLERANCE
    assert (c.logits(LENGTH) - plain.logits(LENGTH)).abs().max() > LOUD


@pytest.mark.parametrize("step", [2, 3])
def test_interleaved_dense_layers(small, step: int) -> None:
    """step 3 of 4 layers: only layer 2 has experts; a dense layer has the size intermediate_size_mlp."""
    c = small(step=step)
    assert c.model().config.moe_layers == tuple((i + 1) % step == 0 for i in range(4))
    assert error(c) <= TOLERANCE
    assert error(c, moe_layers=None) <= TOLERANCE  # transformers writes the list out; here the step alone says it


def test_tied_head(small) -> None:
    c = small(tie=True)
    assert "lm_head.weight" not in dict(c.model().named_parameters())
    assert error(c) <= TOLERANCE


def test_norm_weights_are_applied(small) -> None:
    """The oracle's norm weights lie between 0.8 and 1.2: each one matters."""
    c = small()
    for name, weight in c.model().named_parameters():
        if name.endswith("norm.weight"):
            assert (weight - 1).abs().max() > 0.1
    assert error(c) <= TOLERANCE


def ours_config(**options):
    from l4core.model.config import ModelConfig
    from l4core.testing.models.checkpoints import text_config

    raw = text_config(hidden=16, inter=24, heads=2, kv_heads=1, head_dim=8, **options).to_dict()
    return ModelConfig.from_dict(raw | {"architectures": ["Llama4ForCausalLM"]})


def filled(module):
    generator = torch.Generator().manual_seed(0)
    for param in module.parameters():
        param.copy_(torch.randn(param.shape, generator=generator))
    return module


def swiglu(x, gate_up, down):
    gate, up = (x @ gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down
