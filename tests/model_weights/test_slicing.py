"""Tensor parallelism: what the ranks hold, put together again, is the whole; and a rank's heads belong together."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_folder import (
    Tensors,
    as_stored,
    empty_parameters,
    hf_tensors,
    prefixed,
    split_experts,
    tiny_config,
    whole_parameters,
)

from l4core.errors import ConfigError
from l4core.model.config import ModelConfig
from l4core.model.layout import parameters
from l4core.model.slicing import check_world, rank_config, rank_shape
from l4core.model.weight_plan import plan_weights
from l4core.model.weights import place_of


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelConfig, int, bool]:
    """(config, world, one tensor an expert) where `world` ranks can share the model."""
    kv = draw(st.sampled_from([1, 2, 3, 4]))
    heads = kv * draw(st.sampled_from([1, 2, 3, 4]))
    worlds = [w for w in range(1, heads + 1) if heads % w == 0 and (kv % w == 0 or w % kv == 0)]
    world = draw(st.sampled_from(worlds))
    config = tiny_config(
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=draw(st.sampled_from([2, 4])),
        hidden_size=draw(st.integers(1, 5)),
        intermediate_size=world * draw(st.integers(1, 4)),
        intermediate_size_mlp=world * draw(st.integers(1, 4)),
        vocab_size=world * draw(st.integers(1, 4)),
        num_local_experts=draw(st.integers(1, 3)),
        num_hidden_layers=2,
        interleave_moe_layer_step=draw(st.sampled_from([1, 2])),
        tie_word_embeddings=draw(st.booleans()),
    )
    return config, world, draw(st.booleans())


def share(config: ModelConfig, tensors: Tensors, rank: int, world: int) -> Tensors:
    """One rank's parameters, filled region by region as the loader does it."""
    params = empty_parameters(config, as_stored(tensors), rank=rank, world=world)
    for target in plan_weights(as_stored(tensors), config, rank=rank, world=world).targets:
        for region in target.regions:
            part = tensors[region.source][tuple(slice(a, b) for a, b in region.source_box)]
            place_of(params[target.name], region).copy_(part)
    return params


@given(models())
def test_shares_of_all_ranks_put_together_are_the_whole(case: tuple[ModelConfig, int, bool]) -> None:
    config, world, one_each = case
    fused = hf_tensors(config)
    tensors = prefixed(split_experts(fused) if one_each else fused, wrapped=one_each)
    shares = [share(config, tensors, rank, world) for rank in range(world)]
    whole = whole_parameters(config, fused)
    assert set(shares[0]) == set(whole)
    for name, want in whole.items():
        torch.testing.assert_close(together(name, config, [s[name] for s in shares]), want, rtol=0, atol=0)


def together(name: str, config: ModelConfig, shares: list[torch.Tensor]) -> torch.Tensor:
    """The whole parameter from the ranks' shares, by the rules of Megatron-style tensor parallelism."""
    world, d = len(shares), config.head_dim
    if name.endswith("qkv.weight"):
        q_rows, kv_rows = config.num_q_heads * d // world, max(1, config.num_kv_heads // world) * d
        qs, ks, vs = zip(*(s.split([q_rows, kv_rows, kv_rows]) for s in shares), strict=True)
        step = max(1, world // config.num_kv_heads)
        for copies in (ks, vs):
            for i, copy in enumerate(copies):
                assert torch.equal(copy, copies[i // step * step])
        return torch.cat([*qs, *ks[::step], *vs[::step]])
    if name.endswith("gate_up.weight"):
        return torch.cat([*(s.chunk(2)[0] for s in shares), *(s.chunk(2)[1] for s in shares)])
    if name.endswith("experts.gate_up"):
        return torch.cat([*(s.chunk(2, dim=2)[0] for s in shares), *(s.chunk(2, dim=2)[1] for s in shares)], dim=2)
    if name.endswith(("attn.o.weight", "down.weight", "experts.down")):
        return torch.cat(shares, dim=1)
    if name in ("embed.weight", "lm_head.weight"):
        return torch.cat(shares)
    assert all(torch.equal(s, shares[0]) for s in shares), name
    return shares[0]


@given(models())
def test_a_rank_by_itself_is_a_whole_model_of_its_shapes(case: tuple[ModelConfig, int, bool]) -> None:
    config, world, _ = case
    alone = {p.name: p.shape for p in parameters(rank_config(config, world), ())}
    for rank in range(world):
        assert alone == {p.name: rank_shape(p, rank, world) for p in parameters(config, ())}


def test_a_rank_holds_the_kv_head_of_its_query_heads() -> None:
    """8 query heads on 2 KV heads, 4 ranks: ranks 0 and 1 have KV head 0, ranks 2 and 3 head 1."""
    config = tiny_config()
    tensors = prefixed(hf_tensors(config), wrapped=False)
    for rank in range(4):
        qkv = share(config, tensors, rank, 4)["layers.0.attn.qkv.weight"]
        heads = qkv.split(config.head_dim)
        q, k = (tensors[f"model.layers.0.self_attn.{x}_proj.weight"].split(config.head_dim) for x in "qk")
        assert torch.equal(heads[0], q[2 * rank])
        assert torch.equal(heads[1], q[2 * rank + 1])
        assert torch.equal(heads[2], k[2 * rank // 4])


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (3, {}),
        (16, {}),
        (0, {}),
        (8, {"vocab_size": 57}),
        (8, {"intermediate_size": 25}),
        (8, {"intermediate_size_mlp": 41}),
        (2, {"num_attention_heads": 6, "num_key_value_heads": 3}),
    ],
)
def test_a_world_that_does_not_divide_is_refused_with_those_that_do(world: int, changes: Mapping[str, int]) -> None:
    with pytest.raises(ConfigError, match=rf"^{world} tensor-parallel ranks cannot share .* evenly\n  fix: --tp 1"):
        check_world(tiny_config(**changes), world)


def test_usable_worlds_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"--tp 1, 2, 4, 8$"):
        check_world(tiny_config(), 5)
    check_world(tiny_config(), 8)


def test_the_dense_size_does_not_count_where_every_layer_is_moe() -> None:
    check_world(tiny_config(interleave_moe_layer_step=1, intermediate_size_mlp=41), 8)
