"""The kits: the probe's anywhere, the backend's on a Hopper GPU through the sibling kernels, on Blackwell through its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch

from l4core.testing.conformance import RELEASED, AttentionConformance, ProbeConformance

INSTALLED = importlib.util.find_spec("flashinfer") is not None
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


class TestProbe(ProbeConformance):
    plugin, backend = "l4_trtllm_mha", "trtllm_mha"
    libraries: ClassVar[dict[str, str]] = {"flashinfer": "0.7.2"}


class OnDevice(AttentionConformance):
    plugin, backend, device = "l4_trtllm_mha", "trtllm_mha", "cuda"
    heads = RELEASED
    dtypes = (("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn"))


@pytest.mark.gpu
class TestXqaOnHopper(OnDevice):
    __test__ = INSTALLED and CAPABILITY == (9, 0)
    options: ClassVar[Mapping[str, str]] = {"sibling": "xqa"}
    level = "S"
    tolerance: ClassVar[
        Mapping[str, float]
    ] = {  # beside fp8 KV these kernels round queries and weights to fp8 as well: 0.14 was seen
        **AttentionConformance.tolerance,
        "float8_e4m3fn": 0.3,
    }
    page_sizes = (64, 16)  # each pair of page size and dtype is compiled at first use


@pytest.mark.gpu
class TestOnBlackwell(OnDevice):
    __test__ = INSTALLED and CAPABILITY in ((10, 0), (10, 3))
    page_sizes = (16, 32, 64)
