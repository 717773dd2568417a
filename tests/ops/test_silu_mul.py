from __future__ import annotations

import torch

from l4core.ops.silu_mul import silu_mul


def test_gate_columns_come_first() -> None:
    gate_up = torch.tensor([[0.0, 2.0, 5.0, 3.0]])
    torch.testing.assert_close(silu_mul(gate_up), torch.tensor([[0.0, 3 * 2 / (1 + torch.tensor(-2.0).exp())]]))


def test_a_transposed_view_is_not_changed() -> None:
    gate_up = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).t()
    before = gate_up.clone()
    torch.testing.assert_close(silu_mul(gate_up), torch.nn.functional.silu(before[:, :3]) * before[:, 3:])
    assert torch.equal(gate_up, before)
