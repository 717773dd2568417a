"""The whole test suite a backend needs: L4's kits, told what to look at."""

from typing import ClassVar

from l4core.testing.conformance import AttentionConformance, ProbeConformance, QuickAttentionConformance


class TestProbe(ProbeConformance):
    plugin, backend = "l4_block_attention", "block"


class TestAttention(AttentionConformance):
    plugin, backend = "l4_block_attention", "block"
    combinations = 1


class TestSmallBlocks(QuickAttentionConformance):
    plugin, backend = "l4_block_attention", "block"
    options: ClassVar = {"block_tokens": "16"}
