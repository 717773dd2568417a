"""What a plugin must satisfy before its entries are used: hooks we know, records of the right type, names that nobody else claims."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pluggy

from l4core import plugin_compat
from l4core.errors import PluginError
from l4core.plugin_api import (
    AttentionBackendEntry,
    ChatTemplateEntry,
    DrafterEntry,
    ExpertKernelEntry,
    SamplerEntry,
)
from l4core.plugin_entries import PluginRow, Provided

CORE = "l4core"
_CREATE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True, kw_only=True)
class HookKind:
    """record: what the hook returns a sequence of.  field: where `Plugins` keeps it.  word: how users call one."""

    record: type[Any]
    field: str
    word: str


HOOKS: Mapping[str, HookKind] = {
    "l4_attention_backends": HookKind(
        record=AttentionBackendEntry, field="attention_backends", word="attention backend"
    ),
    "l4_expert_kernels": HookKind(record=ExpertKernelEntry, field="expert_kernels", word="expert kernel"),
    "l4_samplers": HookKind(record=SamplerEntry, field="samplers", word="sampler"),
    "l4_chat_templates": HookKind(record=ChatTemplateEntry, field="chat_templates", word="chat template"),
    "l4_drafters": HookKind(record=DrafterEntry, field="drafters", word="drafter"),
}

PROBED = ("l4_attention_backends", "l4_expert_kernels")
"""Hooks whose entries are chosen by a verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One checked entry. entry_point: the value in the metadata that brought it."""

    hook: str
    provided: Provided[Any]
    entry_point: str

    @property
    def label(self) -> str:
        return f"{HOOKS[self.hook].word} {self.provided.entry.name}"

    @property
    def origin(self) -> tuple[str, str]:
        return self.provided.distribution, self.entry_point


def check_hooks(manager: pluggy.PluginManager, name: str) -> None:
    """PluginError when the plugin registered as `name` has an unknown hook, a wrapper, an unmarked hook or none at all."""
    plugin = manager.get_plugin(name)
    marked: set[str] = set()
    for caller in manager.get_hookcallers(plugin) or []:
        for implementation in caller.get_hookimpls():
            if implementation.plugin is not plugin:
                continue
            marked.add(caller.name)
            if implementation.hookwrapper or implementation.wrapper:
                raise PluginError(
                    f"{caller.name} is a hook wrapper; L4 calls each plugin alone, so there is nothing to wrap"
                )
            if caller.name not in HOOKS and not implementation.optionalhook:
                raise PluginError(f"unknown hook {caller.name}; this core knows {', '.join(HOOKS)}")
    # All hooks are looked up, marked or not: pluggy does so on later calls, where an odd `__getattr__` would hit the other plugins.
    defined = [hook for hook in HOOKS if callable(getattr(plugin, hook, None))]
    unmarked = [hook for hook in defined if hook not in marked]
    if unmarked:
        raise PluginError(
            f"{', '.join(unmarked)} is defined but not marked with @hookimpl, so it would never be called"
        )
    if not marked:
        raise PluginError(f"it has no hook; wanted at least one of {', '.join(HOOKS)}, marked with @hookimpl")


def check_result(hook: str, result: object, row: PluginRow) -> Iterator[Offer]:
    """Offers in what a hook of the plugin `row` returned. PluginError for anything but a list or tuple of the hook's own record with well-formed
    fields."""
    kind = HOOKS[hook]
    if not isinstance(result, (list, tuple)):
        raise PluginError(f"{hook} returned {type(result).__name__}; wanted a list or tuple of {kind.record.__name__}")
    for entry in result:
        if not isinstance(entry, kind.record):
            raise PluginError(f"{hook} returned a {type(entry).__name__} in its list; wanted {kind.record.__name__}")
        _check_entry(hook, entry)
        refused = plugin_compat.refusal(entry.api, row.name, row.version)
        if refused is not None and hook not in PROBED:  # these become candidates that say so themselves
            raise PluginError(f"{kind.word} {entry.name!r}: {refused.reason}; {refused.fix}")
        provided = Provided(entry=entry, distribution=row.name, version=row.version)
        yield Offer(hook=hook, provided=provided, entry_point=row.entry_point)


def _check_entry(hook: str, entry: Any) -> None:
    """Dataclasses check no types; one wrong field here would be a riddle much later."""
    problems = [
        (
            not isinstance(entry.name, str) or not entry.name.strip(),
            f"name is {entry.name!r}; wanted a non-empty string",
        ),
        (type(entry.api) is not int, f"api is {entry.api!r}; wanted the integer the plugin was written for"),
        (
            not isinstance(entry.create, str) or _CREATE.fullmatch(entry.create) is None,
            f'create is {entry.create!r}; wanted "package.module:function"',
        ),
    ]
    if isinstance(entry, (AttentionBackendEntry, ExpertKernelEntry)):
        problems.append((not callable(entry.probe), f"probe is {type(entry.probe).__name__}; wanted a function"))
    if isinstance(entry, (AttentionBackendEntry, DrafterEntry)):
        problems.append(
            (
                not isinstance(entry.options, Mapping)
                or not all(isinstance(x, str) for kv in entry.options.items() for x in kv),
                "options is not a mapping of option name → one line of help",
            )
        )
    if isinstance(entry, ChatTemplateEntry):
        stops = entry.stop_tokens
        problems.append(
            (
                not isinstance(stops, tuple) or not all(isinstance(token, str) for token in stops),
                f"stop_tokens is {stops!r}; wanted a tuple of strings",
            )
        )
    for wrong, text in problems:
        if wrong:
            raise PluginError(f"{hook}: an entry's {text}")


def settle_names(offers: Sequence[Offer]) -> tuple[list[Offer], list[PluginRow]]:
    """→ (offers whose name is theirs alone, a failed row for each that lost). A built-in keeps its name against all comers; among others nobody
    gets a name that two claim, since any choice would hang on the order of installation."""
    claims: dict[tuple[str, str], list[Offer]] = defaultdict(list)
    for offer in offers:
        claims[offer.hook, offer.provided.entry.name].append(offer)
    kept: list[Offer] = []
    rows: list[PluginRow] = []
    for claimants in claims.values():
        core = [offer for offer in claimants if offer.provided.distribution == CORE]
        winners = claimants if len(claimants) == 1 else core if len(core) == 1 else []
        kept += winners
        rows += [_clash(offer, claimants, bool(winners)) for offer in claimants if offer not in winners]
    return kept, rows


def _clash(loser: Offer, claimants: Sequence[Offer], core_keeps_it: bool) -> PluginRow:
    sources = ", ".join(sorted({offer.provided.source for offer in claimants}))
    outcome = "the built-in keeps the name" if core_keeps_it else "none of them is used"
    return PluginRow(
        name=loser.provided.distribution,
        version=loser.provided.version,
        entry_point=loser.entry_point,
        status="failed",
        reason=f"{loser.label} is claimed twice ({sources}); {outcome}: uninstall one, or name it in L4_DISABLE_PLUGINS",
    )
