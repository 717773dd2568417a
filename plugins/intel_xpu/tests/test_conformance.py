"""The kit on doubles of the libraries (level D): the recorded operator schema and argument rules, plain torch behind them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from l4core.plugin_api import Platform
from l4core.testing import contracts, doubles
from l4core.testing.conformance import ODD, RELEASED, AttentionConformance
from l4core.testing.platforms import fake_platform

CONTRACTS = Path(__file__).parents[3] / "tests/data/contracts"


class OnDouble(AttentionConformance):
    __test__ = False
    plugin, backend, level = "l4_intel_xpu", "intel_xpu", "D"
    heads = (RELEASED[-1], RELEASED[-2], *ODD[:2])
    dtypes = (("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float8_e4m3fn"))
    page_sizes = (64, 128)
    combinations = 2
    recorded: ClassVar[str]
    libraries: ClassVar[dict[str, str]]

    def platform(self) -> Platform:
        return replace(fake_platform("xpu", self.libraries), device_name="a CPU, on a double")

    @pytest.fixture(autouse=True)
    def _double(self) -> Iterator[None]:
        with doubles.xpu(contracts.load(CONTRACTS / f"{self.recorded}.json")):
            yield


class TestVllmXpuKernels(OnDouble):
    __test__ = True
    recorded, libraries = "vllm-xpu-kernels-0.1.16.2", {"vllm_xpu_kernels": "0.1.16.2"}


class TestOlderVllmXpuKernels(OnDouble):
    """Its operator takes no scale of the queries."""

    __test__ = True
    combinations = 1
    recorded, libraries = "vllm-xpu-kernels-0.1.13.2", {"vllm_xpu_kernels": "0.1.13.2"}


class TestSglKernel(OnDouble):
    __test__ = True
    recorded, libraries = "sgl-kernel-xpu-0.11.0", {"sgl_kernel": "0.11.0"}
    options: ClassVar[dict[str, str]] = {"provider": "sgl_kernel"}
