"""Public tensor helpers for plugins. Imports torch, so import it where a backend or sampler runs, not where a plugin is declared."""

from __future__ import annotations

from l4core.plugin_ops.attention import gather_kv, merge_lse

__all__ = ["gather_kv", "merge_lse"]
