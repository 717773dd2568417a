from __future__ import annotations

import pytest
import torch

from l4core.ops.norm import qk_norm_, rms_norm


def test_rms_norm() -> None:
    x, weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([1.0, 2.0])
    torch.testing.assert_close(rms_norm(x, weight, 0.5), torch.tensor([[3.0, 8.0], [0.0, 0.0]]) / 13**0.5)


def test_qk_norm_is_per_head_in_place_and_without_weight() -> None:
    rows = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]]])
    qk = rows[:, :2]
    assert qk_norm_(qk, 0.5) is qk
    torch.testing.assert_close(rows, torch.tensor([[[3 / 13**0.5, 4 / 13**0.5], [1.0, 0.0], [9.0, 9.0]]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_normed_in_float32(dtype: torch.dtype) -> None:
    """Squares of 300 overflow float16; in bfloat16 the mean of 256 squares would lose most of its bits."""
    x = (torch.randn(4, 1, 256, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(qk_norm_(x.clone(), 1e-5).double(), wanted, rtol=2**-7, atol=0)
    weight = torch.linspace(0.5, 2, 256).to(dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), wanted * weight.double(), rtol=2**-6, atol=0)
