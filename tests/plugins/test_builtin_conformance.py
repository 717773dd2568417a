"""The built-ins pass the kits that plugin authors are given."""

from __future__ import annotations

from l4core.testing.conformance import (
    AttentionConformance,
    ChatTemplateConformance,
    DrafterConformance,
    Heads,
    ProbeConformance,
    QuickAttentionConformance,
    SamplerConformance,
)

BUILTIN = "l4core.builtin_plugins"


class TestReferenceProbe(ProbeConformance):
    plugin, backend = BUILTIN, "reference"


class TestSdpaProbe(ProbeConformance):
    plugin, backend = BUILTIN, "sdpa"


class TestReference(QuickAttentionConformance):
    plugin, backend = BUILTIN, "reference"
    heads = (Heads(num_q_heads=5, num_kv_heads=1, head_dim=32), Heads(num_q_heads=4, num_kv_heads=2, head_dim=16))


class TestSdpa(AttentionConformance):
    plugin, backend, far_on_cpu = BUILTIN, "sdpa", True
    combinations = 2


class TestDefaultSampler(SamplerConformance):
    plugin, sampler = BUILTIN, "default"


class TestLlama4Template(ChatTemplateConformance):
    plugin, template = BUILTIN, "llama-4"


class TestNgram(DrafterConformance):
    plugin, drafter = BUILTIN, "NGRAM"
    good_options = ({}, {"longest": "3", "shortest": "1", "window": "8"})
    bad_options = ({"longest": "0"}, {"longest": "many"}, {"window": "1"})
