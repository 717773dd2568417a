from __future__ import annotations

import pytest
import torch

from l4core.ops.linear import linear
from l4core.ops.packed import SMALL_WEIGHT, can_pack, pack

needs_packing = pytest.mark.skipif(
    not can_pack(torch.empty(512, 512)), reason="this torch has no oneDNN for this processor"
)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 64, 600])
def test_a_packed_weight_gives_the_plain_product(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(384, 512, generator=generator).to(dtype)
    x = torch.randn(512, rows, generator=generator).to(dtype).t()  # a transposed view
    if not can_pack(weight):
        pytest.skip("bfloat16 is emulated here and stays plain")
    packed = pack(weight)
    assert (packed.shape, packed.dtype) == (weight.shape, dtype)
    out = linear(x, packed)
    assert out.shape == (rows, 384)
    wanted = x.double() @ weight.double().t()
    torch.testing.assert_close(out.double(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)
    target = torch.empty(rows, 384, dtype=dtype)
    assert linear(x, packed, out=target) is target
    assert torch.equal(target, out)


@needs_packing
def test_what_cannot_gain_stays_plain() -> None:
    assert not can_pack(torch.empty(SMALL_WEIGHT // 64, 64))
    assert not can_pack(torch.empty(1024, 1024, dtype=torch.float64))
    assert not can_pack(torch.empty(1024, 1024, device="meta"))
    assert not can_pack(pack(torch.empty(1024, 1024)))
