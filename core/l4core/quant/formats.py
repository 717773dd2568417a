"""Which parameter is kept in which format, and what that takes. Torch-free: `l4 plan` asks before anything is loaded.

    plain         the compute dtype
    fp8_channel   e4m3, one float32 scale for each output
    int4_g128     four bits, one bfloat16 scale for 128 inputs of an output; the last group of a row may be short

Embedding, head, router and norms are always plain. `--quantization fp8` takes every other matrix, `int4` the experts, routed and shared: they are
97 % of Scout, and attention in 4 bits costs more accuracy than it saves time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

PLAIN, FP8, INT4 = "plain", "fp8_channel", "int4_g128"
ONLINE = {"fp8": FP8, "int4": INT4}
"""`--quantization` → format."""
GROUP = 128
"""Inputs that share a scale in int4_g128."""
PACKED_GROUP_BYTES = GROUP // 2 + 2

EXPERTS = (".moe.experts.", ".moe.shared.")
LINEAR = (*EXPERTS, ".attn.qkv.", ".attn.o.", ".mlp.")
"""Parts of the names of parameters that a format may take."""


def format_of(name: str, quantization: str | None) -> str:
    """Format of the parameter `name` (ours) under `--quantization`. quantization: a key of ONLINE, None = plain weights."""
    if quantization is None:
        return PLAIN
    takes = EXPERTS if quantization == "int4" else LINEAR
    return ONLINE[quantization] if any(part in name for part in takes) else PLAIN


def stored_bytes(name: str, shape: Sequence[int], quantization: str | None, plain_bytes: int = 2) -> int:
    """Bytes of one parameter with its scales under `--quantization`. shape, plain_bytes: as `bytes_in` has them."""
    return bytes_in(format_of(name, quantization), shape, plain_bytes)


def bytes_in(kept: str, shape: Sequence[int], plain_bytes: int = 2) -> int:
    """Bytes of one parameter with its scales in a format. shape: as layout.Parameter has it, [out, in], or [E, in, out] for experts.
    plain_bytes: of an element of the compute dtype."""
    if kept == PLAIN:
        return math.prod(shape) * plain_bytes
    inputs, outputs = (shape[1], shape[0]) if len(shape) == 2 else (shape[1], shape[0] * shape[2])
    if kept == FP8:
        return outputs * (inputs + 4)
    return outputs * math.ceil(inputs / GROUP) * PACKED_GROUP_BYTES
