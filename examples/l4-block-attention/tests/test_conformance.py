"""The whole test suite a backend needs: L4's kits, told what to look at."""

from l4core.testing.conformance import AttentionConformance, ProbeConformance


class TestProbe(ProbeConformance):
    plugin, backend = "l4_block_attention", "block"


class TestAttention(AttentionConformance):
    plugin, backend = "l4_block_attention", "block"
    page_sizes = (1, 16, 64)


class TestSmallBlocks(AttentionConformance):
    plugin, backend = "l4_block_attention", "block"
    options, page_sizes = {"block_tokens": "16"}, (16,)
