"""The kit on a double of AITER (level D): the recorded signature, the kernel's rules, plain torch. The kernel itself: test_vendor_kernel."""

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
    plugin, backend, level = "l4_aiter", "aiter", "D"
    heads = (RELEASED[-1], RELEASED[-2], *ODD)
    page_sizes = (64, 128)
    combinations = 2
    arch: ClassVar[str]
    version: ClassVar[str]

    def platform(self) -> Platform:
        return replace(fake_platform(self.arch, {"aiter": self.version}), device_name="a CPU, on a double")

    @pytest.fixture(autouse=True)
    def _double(self) -> Iterator[None]:
        with doubles.aiter(contracts.load(CONTRACTS / f"amd-aiter-{self.version}.json")):
            yield


class TestGfx942(OnDouble):
    __test__ = True
    arch, version = "gfx942", "0.1.7.post2.dev18"
    dtypes = (("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float8_e4m3fnuz"))


class TestGfx950(OnDouble):
    __test__ = True
    arch, version = "gfx950", "0.1.20"
    dtypes = (("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn"))
