"""Finds, checks and asks every installed plugin, once, at start-up. A plugin that fails becomes a row with its reason and stops nobody else.

A plugin is an entry point of the group `l4core`; the built-ins come through the same door. Each entry point is imported in its own `try`,
registered under its distribution's name, inspected, and asked alone. There is no module-level manager: every call of `load_plugins` is new.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pluggy
from packaging.utils import canonicalize_name

from l4core import hookspecs
from l4core.errors import PluginError
from l4core.plugin_api import PROJECT
from l4core.plugin_checks import CORE, HOOKS, Offer, check_hooks, check_result, settle_names
from l4core.plugin_entries import PluginRow, Plugins, Provided, create_object, import_object, quote_failures

__all__ = ["PluginRow", "Plugins", "Provided", "create_object", "import_object", "load_plugins", "quote_failures"]

logger = logging.getLogger(__name__)

DISABLE = "L4_DISABLE_PLUGINS"
STRICT = "L4_STRICT_PLUGINS"
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """An entry point seen in the metadata, not yet imported. point None: the metadata itself could not be read (problem says why)."""

    distribution: str
    version: str
    point: importlib.metadata.EntryPoint | None
    problem: str = ""

    def row(self) -> PluginRow:
        value = self.point.value if self.point is not None else ""
        return PluginRow(name=self.distribution, version=self.version, entry_point=value, status="loaded")


def load_plugins(environ: Mapping[str, str] = os.environ) -> Plugins:
    """Load every plugin of this environment.

    environ: L4_DISABLE_PLUGINS is a comma list of distribution or entry-point names that are not even imported; L4_STRICT_PLUGINS=1 turns any
    failure into PluginError. Without it nothing a plugin does raises here: see `Plugins.failures`.
    """
    strict = _read_strict(environ)
    disabled = _read_disabled(environ)
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    rows: list[PluginRow] = []
    offers: list[Offer] = []
    for found in _find(disabled):
        row, brought = _load_one(manager, found, disabled)
        rows.append(row)
        offers += brought
    kept, clashes = settle_names(offers)
    rows = _finish_rows(rows, kept) + clashes + _missing_core(rows)
    failed = [row for row in rows if row.status == "failed"]
    for row in failed:
        logger.warning("plugin %s %s failed: %s", row.name, row.version, row.reason)
    if strict and failed:
        raise PluginError(
            f"{len(failed)} plugin failure(s) under {STRICT}=1:{quote_failures(failed)}",
            fix=f"repair or uninstall them, or name them in {DISABLE}",
        )
    return _collect(kept, rows)


def _read_strict(environ: Mapping[str, str]) -> bool:
    value = environ.get(STRICT, "")
    if value not in {"", "0", "1"}:
        raise PluginError(f"{STRICT} is {value!r}; wanted 0 or 1", fix=f"export {STRICT}=1")
    return value == "1"


def _read_disabled(environ: Mapping[str, str]) -> frozenset[str]:
    names = (name.strip() for name in environ.get(DISABLE, "").split(","))
    return frozenset(canonicalize_name(name) for name in names if name)


def _find(disabled: frozenset[str]) -> list[_Found]:
    """All entry points of our group, sorted by distribution. Of a distribution that is on the path twice only the first counts, as for imports."""
    found: list[_Found] = []
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        if f"[{PROJECT}]" not in (distribution.read_text("entry_points.txt") or ""):
            continue  # before its other metadata is parsed: there may be hundreds
        name = _metadata(distribution, "Name")
        if name == UNKNOWN or canonicalize_name(name) not in seen:
            seen.add(canonicalize_name(name))
            found += _points_of(distribution, name)
    names = {canonicalize_name(f.distribution) for f in found}
    names |= {canonicalize_name(f.point.name) for f in found if f.point is not None}
    for unknown in sorted(disabled - names):
        logger.warning(
            "%s names %r, which no installed plugin has; found: %s", DISABLE, unknown, ", ".join(sorted(names))
        )
    return sorted(found, key=lambda f: (canonicalize_name(f.distribution), f.point.name if f.point else ""))


def _metadata(distribution: importlib.metadata.Distribution, key: str) -> str:
    """A distribution without a METADATA file (a half-finished uninstall) still has to be told apart from the others."""
    try:
        return str(distribution.metadata[key] or UNKNOWN)
    except Exception:  # noqa: BLE001  (newer Pythons raise here, each its own type)
        return UNKNOWN


def _points_of(distribution: importlib.metadata.Distribution, name: str) -> Iterator[_Found]:
    version = _metadata(distribution, "Version")
    try:
        points = distribution.entry_points.select(group=PROJECT)
    except Exception as error:  # noqa: BLE001  (unreadable metadata of any kind must become a row)
        problem = f"its entry_points.txt cannot be read: {type(error).__name__}: {error}"
        yield _Found(distribution=name, version=version, point=None, problem=problem)
        return
    for point in points:
        yield _Found(distribution=name, version=version, point=point)


def _load_one(manager: pluggy.PluginManager, found: _Found, disabled: frozenset[str]) -> tuple[PluginRow, list[Offer]]:
    row, point = found.row(), found.point
    if point is None:
        return replace(row, status="failed", reason=found.problem), []
    if {canonicalize_name(found.distribution), canonicalize_name(point.name)} & disabled:
        return replace(row, status="disabled", reason=f"named in {DISABLE}"), []
    try:
        return row, _ask(manager, row, point)
    except PluginError as error:
        return replace(row, status="failed", reason=error.message), []


def _ask(manager: pluggy.PluginManager, row: PluginRow, point: importlib.metadata.EntryPoint) -> list[Offer]:
    """Import, register, inspect and ask one plugin. PluginError carries the reason; the plugin is then no longer registered."""
    name = _register(manager, row, point)
    try:
        check_hooks(manager, name)
        others = [plugin for other, plugin in manager.list_name_plugin() if other != name and plugin is not None]
        offers: list[Offer] = []
        for hook in HOOKS:
            for result in _call(manager, hook, others):
                offers += check_result(hook, result, row)
    except Exception as error:
        manager.unregister(name=name)
        if isinstance(error, PluginError):
            raise
        raise PluginError(f"cannot inspect {point.value!r}: {type(error).__name__}: {error}") from error
    return offers


def _register(manager: pluggy.PluginManager, row: PluginRow, point: importlib.metadata.EntryPoint) -> str:
    """→ the name registered under: the distribution's, with the entry point's behind it when a distribution has several."""
    name = row.name if not manager.has_plugin(row.name) else f"{row.name}:{point.name}"
    try:
        plugin = point.load()
    except (Exception, SystemExit) as error:
        raise PluginError(f"cannot import {point.value!r}: {type(error).__name__}: {error}") from error
    try:
        manager.register(plugin, name=name)
    except Exception as error:
        if manager.has_plugin(name):  # pluggy 1.6 keeps a plugin that failed its validation
            manager.unregister(name=name)
        raise PluginError(f"cannot register {point.value!r}: {type(error).__name__}: {error}") from error
    return name


def _call(manager: pluggy.PluginManager, hook: str, others: list[object]) -> list[object]:
    """What the one plugin that is not in `others` returns from `hook`; [] when it has no such hook."""
    try:
        results: list[object] = manager.subset_hook_caller(hook, others)()
    except (Exception, SystemExit) as error:
        raise PluginError(f"{hook} raised {type(error).__name__}: {error}") from error
    return results


def _missing_core(rows: list[PluginRow]) -> list[PluginRow]:
    """The built-ins come by entry point too: a source tree on the path that nobody installed has none, and should say so."""
    if any(row.name == CORE for row in rows):
        return []
    reason = "its entry point is missing, so there are no built-ins: l4core is importable but not installed; pip install l4core"
    return [PluginRow(name=CORE, version=UNKNOWN, entry_point="l4core.builtin_plugins", status="failed", reason=reason)]


def _finish_rows(rows: list[PluginRow], kept: list[Offer]) -> list[PluginRow]:
    """Write into each loaded row what it offers."""
    brought: dict[tuple[str, str], list[str]] = {}
    for offer in kept:
        brought.setdefault(offer.origin, []).append(offer.label)
    return [
        replace(row, offers=tuple(sorted(brought.get((row.name, row.entry_point), ()))))
        if row.status == "loaded"
        else row
        for row in rows
    ]


def _collect(offers: list[Offer], rows: list[PluginRow]) -> Plugins:
    """Sort the offers into their kinds."""
    kinds: dict[str, list[Provided[Any]]] = {hook.field: [] for hook in HOOKS.values()}
    for offer in sorted(offers, key=lambda o: o.provided.entry.name):
        kinds[HOOKS[offer.hook].field].append(offer.provided)
    return Plugins(**{field: tuple(found) for field, found in kinds.items()}, rows=tuple(rows))
