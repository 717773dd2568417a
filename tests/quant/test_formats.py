"""The formats by themselves: there and back, what is lost, and how many bytes it takes."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l4core.engine.start.capacity import load_config, rank_weight_bytes
from l4core.model.layout import parameters
from l4core.quant import fp8, int4
from l4core.quant.formats import FP8, INT4, PLAIN, format_of, stored_bytes


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
def test_words_hold_their_values(experts: int, outputs: int, groups: int) -> None:
    values = torch.randint(0, 16, (experts, outputs, groups, 128), dtype=torch.int16)
    packed = int4.pack(values)
    assert packed.shape == (experts, groups, outputs, 32)
    assert torch.equal(int4.unpack(packed), values)
    word, q, g, n = 7, 3, groups - 1, outputs - 1
    assert int(packed[0, g, n, word]) >> (4 * q) & 15 == values[0, n, g, 32 * q + word]


@pytest.mark.parametrize("inputs", [128, 320, 40])
def test_what_four_bits_lose(inputs: int) -> None:
    weight = torch.randn(2, 60, inputs, generator=torch.Generator().manual_seed(inputs))
    packed, scale = int4.quantize(weight)
    made = int4.dequantize(packed, scale, inputs)
    step = scale.abs().float().transpose(-1, -2).repeat_interleave(128, -1)[..., :inputs]
    inside = weight.abs() <= 7 * step  # the largest of the other sign may miss by a whole one
    assert ((made - weight).abs() <= 0.505 * step)[inside].all()
    assert (made - weight).norm() < 0.11 * weight.norm()


def test_nothing_becomes_of_nothing() -> None:
    packed, scale = int4.quantize(torch.zeros(3, 256))
    assert (scale != 0).all()
    assert not int4.dequantize(packed, scale, 256).any()
    weight, scale = fp8.quantize(torch.zeros(3, 16))
    assert not fp8.dequantize(weight, scale).any()


@pytest.mark.parametrize("inputs", [256, 320])
def test_a_packed_checkpoint_keeps_its_numbers(inputs: int) -> None:
    values = torch.randint(-8, 8, (6, inputs))
    scale = torch.rand(6, math.ceil(inputs / 128)).bfloat16()
    words = ((values.view(6, -1, 8) + 8) << (4 * torch.arange(8))).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    made = int4.dequantize(*int4.from_compressed_tensors(words, scale), inputs)
    assert torch.equal(made, values * scale.float().repeat_interleave(128, -1)[:, :inputs])


def test_eight_bits_lose_a_sixteenth_at_most() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    made = fp8.dequantize(*fp8.quantize(weight))
    assert ((made - weight).abs() <= weight.abs() / 16 + weight.abs().amax(1, keepdim=True) * 2**-17).all()


@pytest.mark.parametrize(("quantization", "gb"), [("fp8", 109.9), ("int4", 63.1)])
def test_whole_scout(quantization: str, gb: float) -> None:
    """63.1 GB is what the issue's arithmetic says too."""
    assert rank_weight_bytes(load_config("scout"), 1, quantization) / 1e9 == pytest.approx(gb, abs=0.05)


def test_planned_bytes_are_those_of_the_tensors() -> None:
    weight = torch.randn(4, 48, 320)  # experts, outputs, inputs
    for name, make in (("fp8", fp8.quantize), ("int4", int4.quantize)):
        tensors = make(weight)
        assert stored_bytes("layers.0.moe.experts.down", (4, 320, 48), name) == sum(t.nbytes for t in tensors)
        tensors = make(weight[0])
        assert stored_bytes("layers.0.moe.shared.down.weight", (48, 320), name) == sum(t.nbytes for t in tensors)
    assert stored_bytes("layers.0.moe.experts.down", (4, 320, 48), None, plain_bytes=4) == 4 * weight.numel()


def test_which_parameters_are_taken() -> None:
    names = [parameter.name for parameter in parameters(load_config("maverick"), ())]
    fp8_kept = {name for name in names if format_of(name, "fp8") == FP8}
    int4_kept = {name for name in names if format_of(name, "int4") == INT4}
    assert int4_kept < fp8_kept
    kinds = {re.sub(r"^layers\.\d+\.", "", name) for name in fp8_kept - int4_kept}
    assert kinds == {"attn.qkv.weight", "attn.o.weight", "mlp.gate_up.weight", "mlp.down.weight"}
    kinds = {re.sub(r"^layers\.\d+\.", "", name) for name in set(names) - fp8_kept}
    norms = {"norm.weight", "attn_norm.weight", "mlp_norm.weight"}
    assert kinds == norms | {"embed.weight", "lm_head.weight", "moe.router.weight"}
    assert {format_of(name, None) for name in names} == {PLAIN}
