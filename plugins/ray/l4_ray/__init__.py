"""L4 on Ray. `l4-ray serve DIR --tp 8` places one engine's ranks over the nodes of a cluster; `serve run l4_ray:app model=DIR replicas=2` runs
replicas behind Ray Serve. What computes and answers is `l4 serve` in both; Ray says where, and starts anew what is gone. Imports ray on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l4_ray.deployment import app

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'l4_ray' has no attribute {name!r}")
    from l4_ray.deployment import app

    return app
