"""Conformance kits for plugin authors: subclass in a test file, name your module and entry, and run pytest (`pip install "l4core[test]"`).

    from l4core.testing.conformance import AttentionConformance, ProbeConformance

    class TestProbe(ProbeConformance):
        plugin, backend = "l4_block_attention", "block"

    class TestAttention(AttentionConformance):
        plugin, backend = "l4_block_attention", "block"

`plugin` is the import name of the module with your hooks. `python -m l4core.testing NAME` runs the same for an installed backend.
Needs pytest, and torch for all but ProbeConformance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l4core.testing.conformance.attention import AttentionConformance, QuickAttentionConformance
    from l4core.testing.conformance.cases import Heads
    from l4core.testing.conformance.chat import ChatTemplateConformance
    from l4core.testing.conformance.drafter import DrafterConformance
    from l4core.testing.conformance.probe import ProbeConformance
    from l4core.testing.conformance.sampler import SamplerConformance
    from l4core.testing.conformance.setup import ODD, RELEASED

__all__ = [
    "ODD",
    "RELEASED",
    "AttentionConformance",
    "ChatTemplateConformance",
    "DrafterConformance",
    "Heads",
    "ProbeConformance",
    "QuickAttentionConformance",
    "SamplerConformance",
]

_HOMES = {
    "AttentionConformance": "attention",
    "ChatTemplateConformance": "chat",
    "DrafterConformance": "drafter",
    "Heads": "cases",
    "ODD": "setup",
    "ProbeConformance": "probe",
    "QuickAttentionConformance": "attention",
    "RELEASED": "setup",
    "SamplerConformance": "sampler",
}


def __getattr__(name: str) -> Any:
    """Each kit is imported when asked for: a chat template's tests need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
