"""FlashAttention-3 as an attention backend of L4. This module holds the hook; it imports no torch."""

from l4_fa3.probe import PROVIDERS, probe
from l4core.plugin_api import PLUGIN_API, AttentionBackendEntry, hookimpl

__all__ = ["l4_attention_backends"]


@hookimpl
def l4_attention_backends() -> list[AttentionBackendEntry]:
    names = ", ".join(provider.module for provider in PROVIDERS)
    options = {"provider": f"whose build of FlashAttention-3 to call: {names} (default: the first of them that works)"}
    return [
        AttentionBackendEntry(name="fa3", api=PLUGIN_API, probe=probe, create="l4_fa3.backend:create", options=options)
    ]
