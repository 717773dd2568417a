"""In which type the operands of a kernel's matrix products are multiplied."""

from __future__ import annotations

import torch
import triton.language as tl

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def dot_type(x: torch.Tensor) -> tl.dtype:
    """x's own; float32 on a CPU, where Triton's interpreter runs, whose products of bfloat16 are wrong."""
    return tl.float32 if x.is_cpu else _TYPES[x.dtype]


def unpacks_inline(x: torch.Tensor) -> bool:
    """Whether weights in fewer bits become x's type by instructions written for it: bfloat16 on NVIDIA's devices."""
    return x.is_cuda and torch.version.hip is None and x.dtype == torch.bfloat16
