"""The kits on a Hopper GPU, once for each build of FlashAttention-3 that is installed there, and the probe's anywhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch

from l4core.testing.conformance import ODD, RELEASED, AttentionConformance, ProbeConformance


def here(library: str) -> bool:
    """Whether this machine is what the kernels are for, and has this library."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return hopper and importlib.util.find_spec(library) is not None


class TestProbe(ProbeConformance):
    plugin, backend = "l4_fa3", "fa3"
    libraries: ClassVar[dict[str, str]] = {
        "flash_attn_interface": "3.0.0.post20260810",
        "sgl_kernel": "0.4.10",
        "vllm": "0.33.0",
    }


class OnHopper(AttentionConformance):
    plugin, backend, device = "l4_fa3", "fa3", "cuda"
    heads = (*RELEASED, *ODD[:2])
    dtypes = (("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn"), ("float16", "float16"))
    tolerance: ClassVar[Mapping[str, float]] = {  # beside fp8 KV the kernel has queries and weights in fp8 as well
        **AttentionConformance.tolerance,
        "float8_e4m3fn": 0.2,
    }


@pytest.mark.gpu
class TestFlashAttnInterface(OnHopper):
    __test__ = here("flash_attn_interface")
    options: ClassVar[Mapping[str, str]] = {"provider": "flash_attn_interface"}


@pytest.mark.gpu
class TestSglKernel(OnHopper):
    __test__ = here("sgl_kernel")
    options: ClassVar[Mapping[str, str]] = {"provider": "sgl_kernel"}


@pytest.mark.gpu
class TestVllm(OnHopper):
    __test__ = here("vllm")
    options: ClassVar[Mapping[str, str]] = {"provider": "vllm"}
