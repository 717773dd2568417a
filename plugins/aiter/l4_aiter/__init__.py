"""Attention and experts on AMD Instinct GPUs for L4. This module holds the hook; it imports neither torch nor aiter."""

from l4_aiter.probe import probe, probe_experts
from l4core.plugin_api import PLUGIN_API, AttentionBackendEntry, ExpertKernelEntry, hookimpl

__all__ = ["l4_attention_backends", "l4_expert_kernels"]


@hookimpl
def l4_attention_backends() -> list[AttentionBackendEntry]:
    return [AttentionBackendEntry(name="aiter", api=PLUGIN_API, probe=probe, create="l4_aiter.backend:create")]


@hookimpl
def l4_expert_kernels() -> list[ExpertKernelEntry]:
    return [ExpertKernelEntry(name="aiter", api=PLUGIN_API, probe=probe_experts, create="l4_aiter.experts:create")]
