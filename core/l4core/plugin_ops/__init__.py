"""Public tensor helpers for plugins. Imports torch, so import it where a backend or sampler runs, not where a plugin is declared.

For plugins are what this package exports and its module `sampling`; the other modules are their insides.
"""

from __future__ import annotations

from l4core.plugin_ops.attention import gather_kv, merge_lse
from l4core.plugin_ops.quantize import quantize_q
from l4core.plugin_ops.tree import tree_attend

__all__ = ["gather_kv", "merge_lse", "quantize_q", "tree_attend"]
