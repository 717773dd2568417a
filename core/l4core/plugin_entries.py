"""What installed plugins offer, as plain records: each entry with the distribution it came from, and one row per plugin for `l4 plugins`.

Filled in by plugin_manager.load_plugins; read by selection, sampling, chat and the command line. Imports no plugin and no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from l4core.errors import PluginError
from l4core.plugin_api import (
    AttentionBackendEntry,
    ChatTemplateEntry,
    DrafterEntry,
    ExpertKernelEntry,
    SamplerEntry,
)


class NamedEntry(Protocol):
    """What all kinds of entry have in common."""

    @property
    def name(self) -> str: ...
    @property
    def api(self) -> int: ...
    @property
    def create(self) -> str: ...


E = TypeVar("E", bound=NamedEntry)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provided(Generic[E]):
    """An entry and where it came from. distribution, version: of the installed package, as its metadata spells them."""

    entry: E
    distribution: str
    version: str

    @property
    def source(self) -> str:
        """Distribution and version, as error messages quote them: "l4-fa3 0.2.0"."""
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginRow:
    """One line of `l4 plugins`. name: distribution.  entry_point: its value in the metadata ("package.module").  reason: why it failed or was
    left out, "" when loaded.  offers: what it brings, such as "attention backend sdpa"."""

    name: str
    version: str
    entry_point: str
    status: Literal["loaded", "failed", "disabled"]
    reason: str = ""
    offers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugins:
    """Everything found at start-up. Entries are sorted by name; order carries no meaning. A plugin that failed is only in `rows`."""

    attention_backends: tuple[Provided[AttentionBackendEntry], ...] = ()
    expert_kernels: tuple[Provided[ExpertKernelEntry], ...] = ()
    samplers: tuple[Provided[SamplerEntry], ...] = ()
    chat_templates: tuple[Provided[ChatTemplateEntry], ...] = ()
    drafters: tuple[Provided[DrafterEntry], ...] = ()
    rows: tuple[PluginRow, ...] = ()

    @property
    def failures(self) -> tuple[PluginRow, ...]:
        """Rows of plugins that failed; quoted by every later "no such backend" error."""
        return tuple(row for row in self.rows if row.status == "failed")


def quote_failures(failures: Sequence[PluginRow]) -> str:
    """One line a failed plugin, to be appended to an error message; "" when none failed."""
    return "".join(f"\n  plugin {row.name} {row.version} failed: {row.reason}" for row in failures)


def import_object(path: str) -> Any:
    """The object at "package.module:name". PluginError with the exception's type and text when it cannot be imported."""
    module_name, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:
        raise PluginError(f"cannot import {path!r}: {type(error).__name__}: {error}") from error


def create_object(provided: Provided[E], base: type[T], *args: object) -> T:
    """Import `create`, call it with `args` and check the type of the result. PluginError names the distribution and version."""
    entry = provided.entry
    make: Callable[..., object] = import_object(entry.create)
    try:
        made = make(*args)
    except (Exception, SystemExit) as error:
        raise PluginError(f"{entry.name!r} of {provided.source}: {type(error).__name__}: {error}") from error
    if not isinstance(made, base):
        raise PluginError(
            f"{entry.name!r} of {provided.source}: {entry.create} returned {type(made).__name__}; wanted a {base.__name__}"
        )
    return made
