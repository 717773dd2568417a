"""The package's hooks. Found through its entry point; imports no torch."""

from l4_block_attention.probe import probe
from l4core.plugin_api import PLUGIN_API, AttentionBackendEntry, hookimpl


@hookimpl
def l4_attention_backends() -> list[AttentionBackendEntry]:
    options = {"block_tokens": "keys read at a time (default 256)"}
    create = "l4_block_attention.backend:create"
    return [AttentionBackendEntry(name="block", api=PLUGIN_API, probe=probe, create=create, options=options)]
