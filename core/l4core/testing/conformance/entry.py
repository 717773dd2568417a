"""What the kits share: the entry under test, found through the plugin's own hook as core does, and a check of refusals."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, TypeVar

from l4core.errors import ConfigError
from l4core.plugin_entries import quote_failures
from l4core.plugin_manager import load_plugins

E = TypeVar("E")

__all__ = ["assert_value_error", "find_entry", "module_of", "version_of"]


def find_entry(plugin: str, hook: str, name: str, record: type[E]) -> E:
    """The entry `name` that module `plugin` returns from `hook`. AssertionError when there is none or it is of another type."""
    module: Any = importlib.import_module(plugin)
    function = getattr(module, hook, None)
    assert function is not None, f"{plugin} has no hook {hook}"
    entries = list(function())
    found = [entry for entry in entries if getattr(entry, "name", None) == name]
    assert len(found) == 1, f"{plugin}.{hook} offers {[getattr(e, 'name', e) for e in entries]}; wanted {name!r} once"
    assert isinstance(found[0], record), f"{name!r} is a {type(found[0]).__name__}; wanted {record.__name__}"
    return found[0]


def module_of(name: str) -> str:
    """Import name of the installed module whose hook offers the attention backend `name`. ConfigError when there is none."""
    plugins = load_plugins()
    for row in plugins.rows:
        if f"attention backend {name}" in row.offers:
            return row.entry_point.partition(":")[0].strip()
    known = sorted(provided.entry.name for provided in plugins.attention_backends)
    raise ConfigError(
        f"no installed plugin offers the attention backend {name!r}; there are {', '.join(known)}"
        + quote_failures(plugins.failures),
        fix="l4 backends",
    )


@functools.cache
def version_of(plugin: str) -> str:
    """Distribution and version of an import name: "l4-fa3 0.1.0"; "PLUGIN, not installed" when no distribution has it."""
    top = plugin.partition(".")[0]
    for name in (top, *importlib.metadata.packages_distributions().get(top, ())):
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return f"{found.metadata['Name']} {found.version}"
    return f"{top}, not installed"


def assert_value_error(call: Callable[[], object], what: str) -> None:
    """`call` must raise a ValueError (HTTP 400) with a text; anything else is an AssertionError that says `what` was tried."""
    try:
        result = call()
    except ValueError as error:
        text = str(error)
    else:
        raise AssertionError(f"{what} was taken and gave {result!r}; wanted a ValueError")
    assert text.strip(), f"{what} is refused without a text"
