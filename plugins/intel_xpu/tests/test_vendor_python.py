"""The library's own Python over the doubled operator: its checks of scales, its rewriting of uniform batches, its slow fallback. Opt in:

    pip download --no-deps vllm-xpu-kernels==0.1.16.2 --platform manylinux_2_28_x86_64 --only-binary=:all:
    unzip -d vllm-xpu-kernels-0.1.16.2 vllm_xpu_kernels-*.whl 'vllm_xpu_kernels/*.py'
    L4_XPU_SOURCE=vllm-xpu-kernels-0.1.16.2 pytest plugins/intel_xpu/tests/test_vendor_python.py

The wheel has 150 MB, most of it kernels that are not needed here. The folder is named after the contract in tests/data/contracts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from l4_intel_xpu.backend import create
from l4core.plugin_api import AttentionContext, AttentionRequirements, BackendUnavailable, Platform
from l4core.testing import contracts, doubles
from l4core.testing.conformance import ODD, RELEASED, AttentionConformance
from l4core.testing.platforms import fake_platform

FOLDER = os.environ.get("L4_XPU_SOURCE", "")
NAME = Path(FOLDER).name
CONTRACTS = Path(__file__).parents[3] / "tests/data/contracts"
MACHINE = replace(
    fake_platform("xpu", {"vllm_xpu_kernels": NAME.rpartition("-")[2] or "0"}),
    device_name="a CPU, the library's Python on a double of its operator",
)

pytestmark = pytest.mark.skipif(not FOLDER, reason="L4_XPU_SOURCE names no vllm-xpu-kernels")


def contract() -> contracts.Contract:
    return contracts.load(CONTRACTS / f"{NAME}.json")


class TestVendorPython(AttentionConformance):
    plugin, backend, level = "l4_intel_xpu", "intel_xpu", "D"
    options: ClassVar[dict[str, str]] = {"provider": "vllm_xpu_kernels"}
    heads = (RELEASED[-1], RELEASED[-2], *ODD[:2])
    dtypes = (("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float8_e4m3fn"))
    page_sizes = (64, 128)

    def platform(self) -> Platform:
        return MACHINE

    @pytest.fixture(autouse=True)
    def _double(self) -> Iterator[None]:
        with doubles.xpu(contract(), source=Path(FOLDER)):
            yield


def test_its_fallback_is_refused_the_second_time_too(capsys: pytest.CaptureFixture[str]) -> None:
    req = AttentionRequirements(num_q_heads=5, num_kv_heads=1, head_dim=128, q_dtype="bfloat16", kv_dtype="bfloat16")
    context = AttentionContext(
        requirements=req,
        platform=MACHINE,
        device="cpu",
        page_size=64,
        options={"provider": "vllm_xpu_kernels"},
        logger=logging.getLogger(__name__),
    )
    with doubles.xpu(contract(), not_compiled="bfloat16", source=Path(FOLDER)):
        for _ in range(2):
            with pytest.raises(BackendUnavailable, match="not compiled"):
                create(context)
