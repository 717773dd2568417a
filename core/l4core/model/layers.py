"""The parts every layer is made of. Parameters are created empty, without gradient, in torch's default dtype and on its default device."""

from __future__ import annotations

import torch
from torch import nn

from l4core.ops.linear import linear
from l4core.ops.norm import add_rms_norm
from l4core.ops.packed import can_pack, pack
from l4core.ops.silu_mul import silu_mul


def parameter(*shape: int, transposed: bool = False) -> nn.Parameter:
    """An empty parameter. transposed: its last two dimensions lie the other way round in memory."""
    order = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    data = torch.empty(order)
    return nn.Parameter(data.transpose(-1, -2) if transposed else data, requires_grad=False)


class Linear(nn.Module):
    """y = x · weightᵀ, weight [out, in], no bias."""

    format = "plain"

    def __init__(self, num_out: int, num_in: int) -> None:
        super().__init__()
        self.weight = parameter(num_out, num_in)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] → [T, out]; the result may be a transposed view."""
        return linear(x, self.weight)

    def pack(self) -> None:
        """Puts the weight, loaded before, in the order a CPU reads fastest; elsewhere, and for a small one, nothing happens."""
        if can_pack(self.weight):
            self.weight = nn.Parameter(pack(self.weight), requires_grad=False)

    def scale(self) -> torch.Tensor | None:
        """The weight's scale in a format that has one."""
        return None


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension of the residual stream x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(size)
        self.eps = eps

    def forward(
        self, stream: torch.Tensor, update: torch.Tensor | None = None, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Adds `update`, where there is one, to stream [T, H] in place; → the norm of the sum, which `kept` [T, H] receives where it is given."""
        return add_rms_norm(stream, update, self.weight, self.eps, kept)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)): a dense layer's MLP and the shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(2 * intermediate_size, hidden_size)  # gate rows first
        self.down = Linear(hidden_size, intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] → [T, H]."""
        out: torch.Tensor = self.down(silu_mul(self.gate_up(x)))
        return out
