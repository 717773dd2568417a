"""The contract's version, and the mark of a hook."""

from __future__ import annotations

import pluggy

__all__ = ["PLUGIN_API", "PROJECT", "hookimpl"]

PLUGIN_API = 1
"""The contract's version. Core serves PLUGIN_API and PLUGIN_API − 1; an entry states the one it was written for in `api`."""

PROJECT = "l4core"
"""pluggy's project name and the entry-point group."""

hookimpl = pluggy.HookimplMarker(PROJECT)
