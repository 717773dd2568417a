"""The HTTP server. `serve` is imported on first use, so that what needs no web framework does not load one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l4core.server.app import serve

__all__ = ["serve"]


def __getattr__(name: str) -> Any:
    if name != "serve":
        raise AttributeError(f"module 'l4core.server' has no attribute {name!r}")
    import importlib

    return importlib.import_module("l4core.server.app").serve
