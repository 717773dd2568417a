from __future__ import annotations

import math

import pytest
import torch

from l4core.model.config import ModelConfig, RopeScaling
from l4core.model.rotary import Rotary, inverse_frequencies, rope_table, temperature
from l4core.testing.models.checkpoints import text_config


def config(**options) -> ModelConfig:
    return ModelConfig.from_dict(text_config(**options).to_dict() | {"architectures": ["Llama4ForCausalLM"]})


@pytest.mark.parametrize(
    ("factor", "low", "high", "original"),
    [(16.0, 1.0, 1.0, 8192), (8.0, 1.0, 4.0, 8192), (16.0, 1.0, 4.0, 256)],
    ids=["scout", "scout's first upload", "tiny"],
)
def test_scaled_frequencies_equal_transformers(factor: float, low: float, high: float, original: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    hf = text_config(head_dim=128)
    hf.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](hf, torch.device("cpu"))
    scaling = RopeScaling(
        factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=original
    )
    ours = inverse_frequencies(128, 500000.0, scaling)
    assert attention_factor == 1.0
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=0)
    assert (ours < inverse_frequencies(128, 500000.0, None) * 0.99).any()


def test_plain_frequencies() -> None:
    torch.testing.assert_close(
        inverse_frequencies(4, 10000.0, None), torch.tensor([1.0, 0.01], dtype=torch.float64), rtol=1e-15, atol=0
    )


def test_table_is_the_rounded_true_value() -> None:
    table = rope_table(config(), 100, torch.float32)
    angle = 77 * 500000.0 ** (-2 * 3 / 32)
    assert table.shape == (100, 16, 2)
    assert table.dtype == torch.float32
    assert table[77, 3].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-7)


def test_chunked_layers_take_positions_mod_chunk_at_any_length() -> None:
    rotary = Rotary(config(chunk=64), max_positions=100)
    far = torch.tensor([5, 64 + 5, 10_000_000 * 64 + 5])
    rows = rotary.rows(far, chunked=True, dtype=torch.float32)
    assert rows.shape == (3, 1, 16, 2)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[0, 0], rope_table(config(), 6, torch.float32)[5])


def test_full_layers_take_absolute_positions() -> None:
    rotary = Rotary(config(chunk=64), max_positions=100)
    rows = rotary.rows(torch.tensor([5, 69]), chunked=False, dtype=torch.float64)
    assert torch.equal(rows[1, 0], rope_table(config(), 70, torch.float64)[69])
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("floor_scale", [8192, 64, 100, 7])
def test_temperature_steps_at_exactly_its_borders(floor_scale: int) -> None:
    c = config(floor_scale=floor_scale)
    positions = [
        p
        for k in (0, 1, 2, 1000, 100_000)
        for p in (k * floor_scale - 2, k * floor_scale - 1, k * floor_scale)
        if p >= 0
    ]
    wide = temperature(torch.tensor(positions), c, torch.float64)
    narrow = temperature(torch.tensor(positions), c, torch.float32)
    exact = [1 + 0.1 * math.log1p((p + 1) // floor_scale) for p in positions]
    torch.testing.assert_close(wide, torch.tensor(exact, dtype=torch.float64), rtol=1e-15, atol=0)
    torch.testing.assert_close(narrow.double(), torch.tensor(exact, dtype=torch.float64), rtol=2e-7, atol=0)


def test_temperature_is_one_before_the_first_border() -> None:
    assert temperature(torch.arange(8191), config(floor_scale=8192), torch.float32).unique().tolist() == [1.0]
    assert temperature(torch.tensor([8191]), config(floor_scale=8192), torch.float32).item() == pytest.approx(
        1 + 0.1 * math.log(2)
    )
