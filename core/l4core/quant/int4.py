"""int4_g128: four bits a weight, symmetric, a bfloat16 scale for 128 inputs of an output; the order of bits is the kernels'.

    packed int16 [..., ⌈K/128⌉, N, 32]    nibble q of word j of group g = W[n, 128·g + 32·q + j] + 8
    scale bfloat16 [..., ⌈K/128⌉, N]

Why this order: a group of any number of outputs is one contiguous stretch of memory, and nibble q of a tile of words is a tile of weights, so
a kernel unpacks with a shift, a mask and a subtraction in registers and moves nothing between lanes. A row's last group may be short; it is filled
up with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from l4core.quant.formats import GROUP

NIBBLES = 4
WORDS = GROUP // NIBBLES
OFFSET = 8
TINY = 2.0**-60


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [..., N, K] → (packed, scale). The largest of a group becomes −8 (the scale takes its sign), so all sixteen values are used. Giving up
    some of the largest for finer steps leaves less squared error and costs perplexity: docs/decisions/016-quantised-weights.md."""
    groups = _grouped(weight).float()  # [..., N, G, 128]
    at = groups.abs().argmax(-1, keepdim=True)
    scale = (groups.gather(-1, at) / -float(OFFSET)).bfloat16()
    scale = torch.where(scale == 0, torch.full_like(scale, TINY), scale)
    values = (groups / scale.float()).round_().clamp_(-OFFSET, OFFSET - 1)
    return pack(values.to(torch.int16) + OFFSET), scale.squeeze(-1).transpose(-1, -2).contiguous()


def dequantize(
    packed: torch.Tensor, scale: torch.Tensor, inputs: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(packed, scale) → [..., N, inputs] of `dtype`, multiplied in float32."""
    values = unpack(packed).float() - OFFSET  # [..., N, G, 128]
    return (values * scale.transpose(-1, -2).float().unsqueeze(-1)).flatten(-2)[..., :inputs].to(dtype)


def linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [T, K] · Wᵀ → [T, N] in x's dtype: the definition."""
    return F.linear(x, dequantize(packed, scale, x.shape[-1], x.dtype))


def pack(values: torch.Tensor) -> torch.Tensor:
    """values int16 [..., N, G, 128] in 0 … 15 → int16 [..., G, N, 32]."""
    parts = values.view(*values.shape[:-1], NIBBLES, WORDS)
    words = parts[..., 0, :]
    for q in range(1, NIBBLES):
        words = words | parts[..., q, :] << 4 * q
    return words.transpose(-2, -3).contiguous()


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`: int16 [..., N, G, 128]."""
    return torch.stack([packed >> 4 * q & 15 for q in range(NIBBLES)], -2).flatten(-2).transpose(-2, -3)


def from_compressed_tensors(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A `pack-quantized` checkpoint's weight_packed int32 [..., N, ⌈K/8⌉] (first input in the lowest bits, value + 8) and weight_scale
    [..., N, ⌈K/128⌉] in our order. Bits are moved, nothing is rounded but a scale that is not bfloat16."""
    values = torch.stack([packed >> 4 * i & 15 for i in range(8)], -1).flatten(-2).to(torch.int16)
    return pack(_grouped(values, fill=OFFSET)), scale.to(torch.bfloat16).transpose(-1, -2).contiguous()


def _grouped(rows: torch.Tensor, fill: int = 0) -> torch.Tensor:
    """[..., N, K] → [..., N, ⌈K/128⌉, 128], filled up at the end."""
    missing = -rows.shape[-1] % GROUP
    full = F.pad(rows, (0, missing), value=fill) if missing else rows.contiguous()
    return full.view(*rows.shape[:-1], -1, GROUP)
