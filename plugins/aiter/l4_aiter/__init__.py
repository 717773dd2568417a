"""Attention on AMD Instinct GPUs as a backend of L4. This module holds the hook; it imports neither torch nor aiter."""

from l4_aiter.probe import probe
from l4core.plugin_api import PLUGIN_API, AttentionBackendEntry, hookimpl

__all__ = ["l4_attention_backends"]


@hookimpl
def l4_attention_backends() -> list[AttentionBackendEntry]:
    return [AttentionBackendEntry(name="aiter", api=PLUGIN_API, probe=probe, create="l4_aiter.backend:create")]
