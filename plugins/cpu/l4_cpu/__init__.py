"""Experts and paged attention on a CPU, in C++, as a kernel and a backend of L4. This module holds the hooks; it imports no torch."""

from l4_cpu.probe import probe_attention, probe_experts
from l4core.plugin_api import PLUGIN_API, AttentionBackendEntry, ExpertKernelEntry, hookimpl

__all__ = ["l4_attention_backends", "l4_expert_kernels"]


@hookimpl
def l4_attention_backends() -> list[AttentionBackendEntry]:
    return [AttentionBackendEntry(name="cpu", api=PLUGIN_API, probe=probe_attention, create="l4_cpu.attention:create")]


@hookimpl
def l4_expert_kernels() -> list[ExpertKernelEntry]:
    return [ExpertKernelEntry(name="cpu", api=PLUGIN_API, probe=probe_experts, create="l4_cpu.experts:create")]
