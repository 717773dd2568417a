"""Layers whose weights are kept in fewer bits, and the exchange of plain layers for them in a model that has no memory yet."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from l4core.model.layers import Linear
from l4core.model.llama4 import Llama4
from l4core.model.moe import Experts, MoE
from l4core.quant.formats import FP8, GROUP, INT4, PLAIN
from l4core.quant.linear import fp8_linear, int4_linear

Formats = Mapping[str, str]
"""Parameter name → format; a name that is not in it is plain."""


class QuantisedLinear(Linear):
    """y = x · Wᵀ with W in `format`: fp8_channel: weight e4m3 [out, in], weight_scale float32 [out, 1].  int4_g128: weight int16
    [⌈in/128⌉, out, 32], weight_scale bfloat16 [⌈in/128⌉, out]."""

    def __init__(self, plain: Linear, kept: str) -> None:
        nn.Module.__init__(self)
        num_out, num_in = plain.weight.shape
        self.format = kept
        self.weight, self.weight_scale = _pair(kept, (num_out, num_in), plain.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] → [T, out]; the result may be a transposed view."""
        apply = fp8_linear if self.format == FP8 else int4_linear
        return apply(x, self.weight, self.weight_scale)

    def scale(self) -> torch.Tensor:
        """The weight's."""
        return self.weight_scale

    def pack(self) -> None:
        """Its order is the kernels' already."""


class QuantisedExperts(Experts):
    """The routed experts in `format`. fp8_channel: shapes and memory as plain, e4m3, with scales float32 [E, outputs, 1].  int4_g128: int16
    [E, ⌈inputs/128⌉, outputs, 32] with scales bfloat16 [E, ⌈inputs/128⌉, outputs]."""

    def __init__(self, plain: Experts, kept: str) -> None:
        nn.Module.__init__(self)
        self.format = kept
        for name in ("gate_up", "down"):
            experts, num_in, num_out = getattr(plain, name).shape
            weight, scale = _pair(kept, (experts, num_out, num_in), plain.gate_up.device)
            in_by_out = nn.Parameter(weight.transpose(1, 2), requires_grad=False)
            self.register_parameter(name, in_by_out if kept == FP8 else weight)
            self.register_parameter(f"{name}_weight_scale", scale)

    def matrices(self) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """(gate_up, its scale), (down, its scale) as kernels read them."""
        in_by_out = self.format == FP8
        gate_up = self.gate_up.transpose(1, 2) if in_by_out else self.gate_up
        down = self.down.transpose(1, 2) if in_by_out else self.down
        return (gate_up, self.get_parameter("gate_up_weight_scale")), (down, self.get_parameter("down_weight_scale"))


def _pair(kept: str, shape: tuple[int, ...], device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
    """Empty weight and scale of a matrix, or of one for each expert. shape: [..., out, in]."""
    *lead, num_out, num_in = shape
    if kept == FP8:
        weight = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        scale = torch.empty(*lead, num_out, 1, dtype=torch.float32, device=device)
    else:
        groups = -(-num_in // GROUP)
        weight = torch.empty(*lead, groups, num_out, GROUP // 4, dtype=torch.int16, device=device)
        scale = torch.empty(*lead, groups, num_out, dtype=torch.bfloat16, device=device)
    return nn.Parameter(weight, requires_grad=False), nn.Parameter(scale, requires_grad=False)


def exchange_layers(model: Llama4, formats: Formats) -> Llama4:
    """Exchanges the layers of `model` (on the meta device, already in its compute dtype) whose parameters `formats` names. In place."""
    kept = {name: fmt for name, fmt in formats.items() if fmt != PLAIN}
    for name, module in list(model.named_modules()):
        if isinstance(module, MoE):
            found = kept.get(f"{name}.experts.gate_up", PLAIN)
            if found != PLAIN:
                module.experts = QuantisedExperts(module.experts, found)
        elif isinstance(module, Linear) and f"{name}.weight" in kept:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], QuantisedLinear(module, kept[f"{name}.weight"]))
    return model


def expert_formats(formats: Formats, layer: int) -> tuple[str, str]:
    """(routed, shared) of one layer."""
    at = f"layers.{layer}.moe."
    return formats.get(f"{at}experts.gate_up", PLAIN), formats.get(f"{at}shared.gate_up.weight", PLAIN)


__all__ = ["INT4", "Formats", "QuantisedExperts", "QuantisedLinear", "exchange_layers", "expert_formats"]
