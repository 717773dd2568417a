from __future__ import annotations

import math

import pytest
import torch

from l4core.ops.rope import _turn_as_complex, _turn_as_pairs, rope_


def cos_sin(angles: torch.Tensor) -> torch.Tensor:
    """angles [T, D/2] → [T, 1, D/2, 2]."""
    return torch.stack((angles.cos(), angles.sin()), dim=-1).unsqueeze(1)


def test_a_quarter_turn_of_one_pair() -> None:
    qk = torch.tensor([[[1.0, 0.0, 5.0, 6.0], [0.0, 1.0, 7.0, 8.0]]])
    assert rope_(qk, cos_sin(torch.tensor([[math.pi / 2, 0.0]]))) is qk
    torch.testing.assert_close(qk, torch.tensor([[[0.0, 1.0, 5.0, 6.0], [-1.0, 0.0, 7.0, 8.0]]]))


@pytest.mark.parametrize("turn", [_turn_as_complex, _turn_as_pairs])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_both_ways_equal_complex_numbers(turn, dtype: torch.dtype) -> None:
    """On a slice of wider rows, as q and k lie beside v; v stays."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 6, 8, generator=generator, dtype=torch.float64).to(dtype)
    angles = torch.rand(5, 4, generator=generator, dtype=torch.float64) * 6
    before = rows.double()
    pairs = torch.complex(before[:, :4, 0::2], before[:, :4, 1::2]) * torch.polar(
        torch.ones(5, 1, 4, dtype=torch.float64), angles[:, None]
    )
    wanted = torch.stack((pairs.real, pairs.imag), dim=-1).flatten(-2)
    turn(rows[:, :4], cos_sin(angles).to(torch.float64 if dtype == torch.float64 else torch.float32))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 2e-2)
    torch.testing.assert_close(rows[:, :4].double(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(rows[:, 4:].double(), before[:, 4:])
