"""TensorRT-LLM's attention kernels as an attention backend of L4. This module holds the hook; it imports no torch."""

from l4_trtllm_mha.probe import probe
from l4core.plugin_api import PLUGIN_API, AttentionBackendEntry, hookimpl

__all__ = ["l4_attention_backends"]


@hookimpl
def l4_attention_backends() -> list[AttentionBackendEntry]:
    options = {
        "sibling": "xqa: on Hopper run the same code through FlashInfer's XQA kernels, one query row at a time, to try it out",
        "workspace_mb": "MiB of scratch memory shared by all layers (default 256)",
    }
    return [
        AttentionBackendEntry(
            name="trtllm_mha",
            api=PLUGIN_API,
            probe=probe,
            create="l4_trtllm_mha.backend:create",
            options=options,
        )
    ]
