"""L4's kits: on a CPU through Triton's interpreter in a quick selection, with L4_TEST_DEVICE=cuda whole and on the device."""

from __future__ import annotations

import os
from typing import ClassVar

import pytest

from l4core.testing.conformance import AttentionConformance, ProbeConformance, QuickAttentionConformance

# the interpreter is numpy, which says so when a score is infinite; a device computes on
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

DEVICE = os.environ.get("L4_TEST_DEVICE", "cpu")
ON_CPU = DEVICE == "cpu"


class TestProbe(ProbeConformance):
    plugin, backend = "l4_triton", "triton"
    libraries: ClassVar[dict[str, str]] = {"triton": "3.6.0"}


class TestAttention(QuickAttentionConformance if ON_CPU else AttentionConformance):  # type: ignore[misc]  # one of two kits
    plugin, backend, device = "l4_triton", "triton", DEVICE
    level = "V" if ON_CPU else "R"

    if ON_CPU:

        def test_offsets_past_32_bits(self) -> None:  # type: ignore[override]
            pytest.skip("the interpreter copies the whole of every tensor it is given; this runs on devices")
