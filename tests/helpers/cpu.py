"""Attention backends of this machine's CPU."""

from __future__ import annotations

from l4core.attention.select import candidates
from l4core.platform import detect
from l4core.plugin_api import AttentionRequirements, Usable
from l4core.plugin_manager import load_plugins


def cpu_backends() -> list[str]:
    """The built-in ones, the definition first, and l4-cpu's where it is installed with its kernels."""
    req = AttentionRequirements(num_q_heads=2, num_kv_heads=1, head_dim=16, q_dtype="float32", kv_dtype="float32")
    found = candidates(load_plugins().attention_backends, detect("cpu"), req)
    usable = {c.entry.name for c in found if isinstance(c.verdict, Usable)}
    return [name for name in ("reference", "sdpa", "cpu") if name in usable]
