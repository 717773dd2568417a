"""Attention on Intel GPUs as a backend of L4. This module holds the hook; it imports no torch."""

from l4_intel_xpu.probe import PROVIDERS, probe
from l4core.plugin_api import PLUGIN_API, AttentionBackendEntry, hookimpl

__all__ = ["l4_attention_backends"]


@hookimpl
def l4_attention_backends() -> list[AttentionBackendEntry]:
    names = ", ".join(provider.module for provider in PROVIDERS)
    return [
        AttentionBackendEntry(
            name="intel_xpu",
            api=PLUGIN_API,
            probe=probe,
            create="l4_intel_xpu.backend:create",
            options={"provider": f"whose kernels to call: {names} (default: the first of them that works)"},
        )
    ]
