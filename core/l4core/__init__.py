"""L4: a serving engine for Llama 4. The three names of the offline API are imported on first use, so that a plugin's import stays light."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l4core.config import EngineConfig
    from l4core.engine.llm import LLM
    from l4core.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "SamplingParams", "__version__"]

_HOMES = {"LLM": "l4core.engine.llm", "EngineConfig": "l4core.config", "SamplingParams": "l4core.request"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'l4core' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
