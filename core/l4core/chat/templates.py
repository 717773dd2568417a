"""Which chat template serves a checkpoint: the flag, else the checkpoint's own, else the built-in `llama-4` with one warning."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from l4core.chat.folder import jinja_source, named_tokens
from l4core.chat.jinja import JinjaTemplate
from l4core.chat.tokenizer import Tokenizer
from l4core.errors import CheckpointError, ConfigError
from l4core.plugin_api import ChatTemplate, ChatTemplateEntry, Piece, Special
from l4core.plugin_entries import Provided, create_object

DEFAULT_ENTRY = "llama-4"
JINJA_SUFFIXES = (".jinja", ".jinja2", ".j2")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenTemplate:
    """source: what start-up prints, an entry's name and distribution or a file.  stop_ids: end an answer beside the checkpoint's eos ids."""

    template: ChatTemplate
    source: str
    stop_ids: tuple[int, ...] = ()


class NoTemplate(ChatTemplate):
    """Stands where no template fits the checkpoint: completions work, chat is refused with the reason."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
    ) -> list[Piece]:
        raise ValueError(self._reason)


def choose_template(
    named: str | None, folder: Path, tokenizer: Tokenizer, entries: Sequence[Provided[ChatTemplateEntry]]
) -> ChosenTemplate:
    """named: `--chat-template`.  entries: built-in and plugins'.

    Raises ConfigError for a name that is nothing, CheckpointError for a template that is not Jinja or needs special tokens the tokenizer
    lacks, PluginError for an entry that cannot be created.
    """
    if named is not None:
        entry = _entry(named, entries)
        if entry is not None:
            return _from_entry(entry, tokenizer)
        if Path(named).is_file() or named.endswith(JINJA_SUFFIXES):
            return _from_jinja(*_read_flag_file(Path(named)), folder, tokenizer)
        raise ConfigError(_unknown(named, entries), fix=_nearest(named, entries))
    own = jinja_source(folder)
    return _default(folder, tokenizer, entries) if own is None else _from_jinja(*own, folder, tokenizer)


def _default(folder: Path, tokenizer: Tokenizer, entries: Sequence[Provided[ChatTemplateEntry]]) -> ChosenTemplate:
    entry = _entry(DEFAULT_ENTRY, entries)
    missing = f"the plugin with the template {DEFAULT_ENTRY} is disabled" if entry is None else ""
    if entry is not None:
        try:
            chosen = _from_entry(entry, tokenizer)
        except CheckpointError as error:
            missing = error.message
        else:
            logger.warning("%s brings no chat template; the built-in %s is used", folder, DEFAULT_ENTRY)
            return chosen
    reason = f"this checkpoint brings no chat template, and the built-in {DEFAULT_ENTRY} does not fit it: {missing}"
    logger.warning("%s. Completions work; chat needs --chat-template NAME or FILE.jinja", reason)
    return ChosenTemplate(template=NoTemplate(f"{reason}; start with --chat-template"), source="none")


def _entry(name: str, entries: Sequence[Provided[ChatTemplateEntry]]) -> Provided[ChatTemplateEntry] | None:
    return next((p for p in entries if p.entry.name == name), None)


def _from_entry(provided: Provided[ChatTemplateEntry], tokenizer: Tokenizer) -> ChosenTemplate:
    template = create_object(provided, ChatTemplate)  # type: ignore[type-abstract]
    for token in _specials_used(template):
        tokenizer.special_id(token)
    return ChosenTemplate(
        template=template,
        source=f"{provided.entry.name} ({provided.source})",
        stop_ids=tuple(tokenizer.special_id(token) for token in provided.entry.stop_tokens),
    )


def _specials_used(template: ChatTemplate) -> list[str]:
    """Special tokens of the smallest dialog; none where the template wants more than a user message."""
    try:
        pieces = template.render([{"role": "user", "content": "hi"}])
    except ValueError:
        return []
    return [p.token for p in pieces if isinstance(p, Special)]


def _from_jinja(text: str, path: str, folder: Path, tokenizer: Tokenizer) -> ChosenTemplate:
    try:
        template = JinjaTemplate(text, specials=tokenizer.specials, variables=named_tokens(folder))
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template in {path} is not Jinja: {error.message} (line {error.lineno})",
            fix=f"--chat-template {DEFAULT_ENTRY}",
        ) from error
    return ChosenTemplate(template=template, source=path)


def _read_flag_file(path: Path) -> tuple[str, str]:
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path} cannot be read: {error}") from error


def _unknown(named: str, entries: Sequence[Provided[ChatTemplateEntry]]) -> str:
    names = ", ".join(p.entry.name for p in entries) or "none"
    return f"--chat-template {named!r} is no known template ({names}) and no .jinja file"


def _nearest(named: str, entries: Sequence[Provided[ChatTemplateEntry]]) -> str:
    near = difflib.get_close_matches(named, [p.entry.name for p in entries], n=1)
    return f"--chat-template {near[0]}" if near else "l4 plugins lists the templates installed"
