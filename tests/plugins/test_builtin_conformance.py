"""The built-ins pass the kits that plugin authors are given."""

from __future__ import annotations

from l4core.testing.conformance import (
    AttentionConformance,
    ChatTemplateConformance,
    ProbeConformance,
    SamplerConformance,
)

BUILTIN = "l4core.builtin_plugins"


class TestReferenceProbe(ProbeConformance):
    plugin, backend = BUILTIN, "reference"


class TestSdpaProbe(ProbeConformance):
    plugin, backend = BUILTIN, "sdpa"


class TestReference(AttentionConformance):
    plugin, backend = BUILTIN, "reference"
    page_sizes = (16,)


class TestSdpa(AttentionConformance):
    plugin, backend = BUILTIN, "sdpa"


class TestDefaultSampler(SamplerConformance):
    plugin, sampler = BUILTIN, "default"


class TestLlama4Template(ChatTemplateConformance):
    plugin, template = BUILTIN, "llama-4"
