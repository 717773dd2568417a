"""L4's kits on this machine's own instruction set."""

from __future__ import annotations

import pytest

from l4core.testing.conformance import AttentionConformance, ProbeConformance


class TestProbe(ProbeConformance):
    plugin, backend = "l4_cpu", "cpu"


@pytest.mark.usefixtures("built")
class TestAttention(AttentionConformance):
    plugin, backend, far_on_cpu = "l4_cpu", "cpu", True
    dtypes = (("float32", "float32"), ("bfloat16", "bfloat16"))
