"""Floors are those computed by hand for 8 of Scout's 48 layers in bfloat16 (benchmarks/NOTES.md), and never more than all there is to read."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4core.bench.floor import (
    decode_bytes,
    expected_experts,
    keys_seen,
    prefill_floor_ms,
    weights_by_config,
)
from l4core.engine.start.capacity import load_config
from l4core.model.config import ModelConfig


@pytest.fixture(scope="module")
def scout8() -> ModelConfig:
    whole = load_config("scout")
    return replace(
        whole,
        num_layers=8,
        moe_layers=whole.moe_layers[:8],
        rope_layers=whole.rope_layers[:8],
        chunked_layers=whole.chunked_layers[:8],
    )


@pytest.mark.parametrize(("batch", "gigabytes"), [(1, 7.14), (8, 18.35), (32, 34.29), (128, 41.59)])
def test_a_decode_step_of_eight_layers_reads_what_was_computed_by_hand(
    scout8: ModelConfig, batch: int, gigabytes: float
) -> None:
    read = decode_bytes(scout8, weights_by_config(scout8), batch=batch, context=1024)
    assert read / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_a_prefill_of_eight_layers(scout8: ModelConfig) -> None:
    weights = weights_by_config(scout8)

    def floor(batch: int, length: int, copy: float = 3.03e12, matmul: float = 750e12) -> float:
        return prefill_floor_ms(scout8, weights, batch=batch, length=length, copy=copy, matmul=matmul)

    assert floor(8, 2048, copy=math.inf, matmul=1e15) == pytest.approx(85.2, abs=0.1)  # its operations, 85.2e12

    assert floor(8, 2048) == pytest.approx(114, abs=1)
    assert floor(1, 2048) == pytest.approx(20.2, abs=0.3)


@pytest.mark.parametrize(("batch", "context", "ms"), [(1, 1, 4.73), (64, 1024, 24.1)])
def test_whole_scout_with_int4_experts(batch: int, context: int, ms: float) -> None:
    """Routed and shared ones, at 3.03 TB/s."""
    config = load_config("scout")
    read = decode_bytes(config, weights_by_config(config, "int4"), batch=batch, context=context)
    assert read / 3.03e12 * 1e3 == pytest.approx(ms, rel=0.01)


@given(batch=st.integers(1, 500), context=st.integers(1, 100_000))
def test_a_step_reads_more_with_more_to_do_and_never_more_than_there_is(batch: int, context: int) -> None:
    config = load_config("scout")
    weights = weights_by_config(config)
    read = decode_bytes(config, weights, batch=batch, context=context)
    assert read < decode_bytes(config, weights, batch=batch + 1, context=context)
    kv = batch * config.num_layers * context * 4 * config.num_kv_heads * config.head_dim
    assert read <= weights.rest + weights.head + weights.routed + kv
    assert decode_bytes(config, weights, batch=batch, context=context, experts=16) >= read


def test_local_layers_see_their_chunk_only() -> None:
    config = load_config("scout")
    assert keys_seen(config, 8192) == 48 * 8192
    assert keys_seen(config, 8193) == 36 * 1 + 12 * 8193
    assert expected_experts(16, 1) == pytest.approx(1)
    assert expected_experts(16, 4) == pytest.approx(3.64, abs=0.01)
    assert expected_experts(1, 5) == 1
