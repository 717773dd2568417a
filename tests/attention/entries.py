"""Entries made by hand: selection needs no installed plugin."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from l4core.plugin_api import (
    PLUGIN_API,
    AttentionBackendEntry,
    AttentionRequirements,
    Platform,
    Tier,
    Usable,
)
from l4core.plugin_entries import PluginRow, Plugins, Provided

STAND_INS = "attention.backends"

SMALL = AttentionRequirements(
    num_q_heads=6, num_kv_heads=2, head_dim=16, q_dtype="float32", kv_dtype="float32", page_size=8, chunk_size=32
)
"""A model small enough to create and check backends for in milliseconds."""


def make_entry(
    name: str,
    verdict: object = None,
    *,
    api: int = PLUGIN_API,
    create: str = "good",
    options: Mapping[str, str] | None = None,
    probe: Callable[[Platform, AttentionRequirements], object] | None = None,
    distribution: str = "",
) -> Provided[AttentionBackendEntry]:
    """verdict: what the probe returns everywhere (an exception is raised).  create: a function of backends.py."""
    answer = Usable(tier=Tier.PORTABLE) if verdict is None else verdict

    def constant(platform: Platform, requirements: AttentionRequirements) -> object:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    made = AttentionBackendEntry(
        name=name,
        api=api,
        probe=probe or constant,  # type: ignore[arg-type]
        create=f"{STAND_INS}:{create}" if ":" not in create else create,
        options=options or {},
    )
    return Provided(entry=made, distribution=distribution or f"l4-{name}", version="1.2")


def make_plugins(*entries: Provided[AttentionBackendEntry], failed: str = "") -> Plugins:
    row = PluginRow(name="l4-dead", version="0.3", entry_point="l4_dead", status="failed", reason=failed)
    return Plugins(attention_backends=entries, rows=(row,) if failed else ())
