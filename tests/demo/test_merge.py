"""The rewrite of a dense layer as a Llama 4 layer keeps its function, and the delta is added to the right place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from l4core.demo.arch import DENSE_FF, EXPERT_FF, EXPERTS, HIDDEN, KV_ROWS, Q_ROWS, SLOTS
from l4core.demo.base import DenseLayer
from l4core.demo.delta import Adapter, LayerDelta
from l4core.demo.folder import layer_tensors
from l4core.demo.merge import LayerWeights, merge_layer, split_layer

QKV = Q_ROWS + 2 * KV_ROWS


def adapter(*shape: int, out: int, into: int, fill: float = 0.0) -> Adapter:
    return Adapter(a=torch.full((*shape, 2, into), fill), b=torch.ones(*shape, out, 2))


def make_delta(*, q: float = 0.0, down: float = 0.0) -> LayerDelta:
    """Zero but for the named adapters, whose product is then 2 · value everywhere."""
    return LayerDelta(
        q=adapter(out=Q_ROWS, into=HIDDEN, fill=q),
        k=adapter(out=KV_ROWS, into=HIDDEN),
        v=adapter(out=KV_ROWS, into=HIDDEN),
        o=adapter(out=HIDDEN, into=HIDDEN),
        gate_up=adapter(SLOTS, 2, out=EXPERT_FF, into=HIDDEN),
        down=adapter(SLOTS, out=HIDDEN, into=EXPERT_FF, fill=down),
        router=torch.zeros(EXPERTS, HIDDEN),
        attn_norm=torch.ones(HIDDEN),
        mlp_norm=torch.ones(HIDDEN),
    )


@pytest.fixture(scope="module")
def dense() -> DenseLayer:
    """Random weights that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).bfloat16().float()

    return DenseLayer(
        attn_norm=torch.ones(HIDDEN),
        qkv=draw(QKV, HIDDEN),
        o=draw(HIDDEN, HIDDEN),
        mlp_norm=torch.ones(HIDDEN),
        gate=draw(DENSE_FF, HIDDEN),
        up=draw(DENSE_FF, HIDDEN),
        down=draw(HIDDEN, DENSE_FF),
    )


@pytest.fixture(scope="module")
def merged(dense: DenseLayer) -> LayerWeights:
    return merge_layer(split_layer(dense), make_delta(), torch.float32)


def moe(tensors: dict[str, torch.Tensor], x: torch.Tensor, expert: int) -> torch.Tensor:
    """transformers' arithmetic: shared expert + one routed expert whose input is scaled by sigmoid(0)."""
    p = "model.layers.7.feed_forward."
    gate, up, down = (tensors[f"{p}shared_expert.{n}_proj.weight"] for n in ("gate", "up", "down"))
    shared = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    routed_gate, routed_up = (0.5 * x @ tensors[f"{p}experts.gate_up_proj"][expert]).chunk(2, -1)
    return shared + (F.silu(routed_gate) * routed_up) @ tensors[f"{p}experts.down_proj"][expert]


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_shared_and_routed_halves_make_the_dense_mlp(dense: DenseLayer, merged: LayerWeights, expert: int) -> None:
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    wanted = (F.silu(x @ dense.gate.T) * (x @ dense.up.T)) @ dense.down.T
    torch.testing.assert_close(moe(layer_tensors(7, merged), x, expert), wanted, atol=1e-4, rtol=1e-4)


def test_attention_is_unchanged_and_split_by_rows(dense: DenseLayer, merged: LayerWeights) -> None:
    tensors = layer_tensors(7, merged)
    q, k, v = (tensors[f"model.layers.7.self_attn.{n}_proj.weight"] for n in "qkv")
    assert torch.equal(torch.cat([q, k, v]), dense.qkv)
    assert (q.shape[0], k.shape[0], v.shape[0]) == (Q_ROWS, KV_ROWS, KV_ROWS)


def test_adapters_are_added(dense: DenseLayer) -> None:
    split = split_layer(dense)
    changed = merge_layer(split, make_delta(q=0.25, down=0.125), torch.float32)
    plain = merge_layer(split, make_delta(), torch.float32)
    difference = changed.qkv - plain.qkv
    torch.testing.assert_close(difference[:Q_ROWS], torch.full((Q_ROWS, HIDDEN), 0.5))
    assert torch.equal(difference[Q_ROWS:], torch.zeros(2 * KV_ROWS, HIDDEN))
    torch.testing.assert_close(changed.down - plain.down, torch.full((HIDDEN, SLOTS * EXPERT_FF), 0.25))


def test_every_tensor_is_stored_whole(merged: LayerWeights) -> None:
    tensors = layer_tensors(7, merged)
    assert all(t.is_contiguous() for t in tensors.values())
    assert tensors["model.layers.7.feed_forward.experts.gate_up_proj"].shape == (EXPERTS, HIDDEN, 2 * EXPERT_FF)
    assert tensors["model.layers.7.feed_forward.experts.down_proj"].shape == (EXPERTS, EXPERT_FF, HIDDEN)
