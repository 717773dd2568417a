"""The contract's versions, in one place: which `api` numbers this core serves, and what to say of the others.

Core serves PLUGIN_API and PLUGIN_API − 1. When the contract changes, the code that lets entries of the last version run on the new one
comes here and nowhere else.
"""

from __future__ import annotations

from l4core.plugin_api import PLUGIN_API, Unusable


def served(current: int = PLUGIN_API) -> tuple[int, ...]:
    """API numbers that a core of version `current` serves, newest first. There never was an API 0."""
    return tuple(n for n in (current, current - 1) if n >= 1)


def refusal(api: int, distribution: str, version: str, *, current: int = PLUGIN_API) -> Unusable | None:
    """None when `api` is served; otherwise why not, with the command that helps."""
    if api in served(current):
        return None
    wanted = " or ".join(str(n) for n in served(current))
    upgrade = "l4core" if api > current else distribution
    age = "newer" if api > current else "older"
    return Unusable(
        reason=f"{distribution} {version} is written for plugin API {api}, {age} than this core serves; wanted {wanted}",
        fix=f"pip install --upgrade {upgrade}",
    )
