"""Which tensors the Triton twins of this package compute."""

from __future__ import annotations

import torch

from l4core.platform import has_triton

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Kernels add in float32; a float64 model stays with torch, which is its oracle everywhere."""

COMPILE = {"enable_fp_fusion": False}
"""Options of every launch. Without fused multiply-adds a kernel rounds where its twin does; these kernels wait for memory, not for arithmetic."""


def has_kernels(x: torch.Tensor) -> bool:
    """The one question that chooses between an operation and its Triton twin."""
    return not x.is_cpu and x.dtype in KERNEL_DTYPES and has_triton(x.device.type)
