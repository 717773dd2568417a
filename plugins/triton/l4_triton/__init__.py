"""The package's hooks. Found through its entry point; imports neither torch nor Triton."""

from __future__ import annotations

from l4_triton.probe import probe
from l4core.plugin_api import PLUGIN_API, AttentionBackendEntry, hookimpl


@hookimpl
def l4_attention_backends() -> list[AttentionBackendEntry]:
    return [AttentionBackendEntry(name="triton", api=PLUGIN_API, probe=probe, create="l4_triton.backend:create")]
