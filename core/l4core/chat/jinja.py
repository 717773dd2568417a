"""A checkpoint's own Jinja template, run in a sandbox as transformers runs it, but with user text kept apart from special tokens.

The characters that make a special token ("<", "|" and ">" for Llama 4) are rendered as stand-in characters where a message holds them, and
put back after the rendered text was split at special tokens. So no special token begins or ends in user text, whatever the template does
with it, and only a template that writes both "<|" and "|>" around user text could still make one (roles, the usual case, are checked words).
Ids equal transformers' unless user text spells a special token or the template searches user text for those characters.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from l4core.chat.messages import NO_TOOLS, check_messages, refuse_images
from l4core.chat.specials import SpecialTokens
from l4core.plugin_api import ChatTemplate, Piece, Text

STAND_INS = [*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xF0100)]
"""Noncharacters of Unicode first, then private characters: those that occur in no message of the dialog are used."""

STRUCTURE = frozenset({"role", "content", "type", "text"})
"""Keys of messages and parts that templates read by name."""

FAILURES = (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template can raise while it runs; anything else is a fault of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """characters: rendered text may exceed eight times the messages by so many.  seconds: checked whenever the template writes something.
    repeat: largest result of `"text" * n` in characters or of `a ** b` in bits."""

    characters: int = 1 << 20
    seconds: float = 10.0
    repeat: int = 1 << 16


class JinjaTemplate(ChatTemplate):
    """source: the template's text.  variables: bos_token and the like.  Raises jinja2.TemplateSyntaxError for a source that is not Jinja."""

    def __init__(
        self,
        source: str,
        *,
        specials: SpecialTokens,
        variables: Mapping[str, str],
        limits: RenderLimits = RenderLimits(),
    ) -> None:
        self._specials, self._variables, self._limits = specials, dict(variables), limits
        self._template = _environment(limits).from_string(source)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
    ) -> list[Piece]:
        if tools:
            raise ValueError(NO_TOOLS)
        checked = check_messages(messages)
        refuse_images(checked)
        guard = _stand_ins(checked, self._specials.telling_characters)
        try:
            text = self._run([_guard(m, guard) for m in checked], add_generation_prompt)
        except FAILURES as error:
            raise ValueError(f"the chat template refused these messages: {_told(error)}") from error
        back = {stand_in: character for character, stand_in in guard.items()}
        return [Text(p.text.translate(back)) if isinstance(p, Text) else p for p in self._specials.split(text)]

    def _run(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        limit = room = self._limits.characters + 8 * sum(map(_num_characters, messages))
        deadline = time.monotonic() + self._limits.seconds
        parts: list[str] = []
        for part in self._template.generate(
            **self._variables,
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        ):
            parts.append(part)
            room -= len(part)
            if room < 0:
                raise ValueError(f"it writes more than {limit} characters")
            if time.monotonic() > deadline:
                raise ValueError(f"it runs longer than {self._limits.seconds} seconds")
        return "".join(parts)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """No attribute beginning with an underscore, no change of what it is given, no huge product or power."""

    intercepted_binops = frozenset({"*", "**"})
    limits = RenderLimits()

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _size(operator, left, right) > self.limits.repeat:
            raise jinja2.exceptions.SecurityError(f"a result of {operator!r} is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks what the model wrote, for training; serving renders what is inside."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(limits: RenderLimits) -> _Sandbox:
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    env.limits = limits
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = _now
    return env


def _raise(message: object) -> None:
    raise jinja2.TemplateRuntimeError(str(message))


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes. Stand-ins stay characters even under ensure_ascii: the characters they stand for are ASCII."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if not ensure_ascii:
        return text
    kept = f"\0-\x7f{''.join(map(chr, STAND_INS))}"
    return re.sub(f"[^{kept}]", lambda m: json.dumps(m.group())[1:-1], text)


def _size(operator: str, left: Any, right: Any) -> int:
    """Size of left * right in items, of left ** right in bits; 0 for a product of numbers."""
    if operator == "**":
        return abs(right) * max(1, abs(left)).bit_length() if isinstance(left, int) and isinstance(right, int) else 0
    pairs = [
        (s, n) for s, n in ((left, right), (right, left)) if isinstance(s, (str, list, tuple)) and isinstance(n, int)
    ]
    return len(pairs[0][0]) * abs(pairs[0][1]) if pairs else 0


def _stand_ins(messages: object, characters: frozenset[str]) -> dict[int, int]:
    """For each character (as a code point) one that occurs nowhere in `messages`."""
    used = set(json.dumps(messages, ensure_ascii=False))
    free = [c for c in STAND_INS if chr(c) not in used]
    if len(free) < len(characters):
        raise ValueError("the messages hold too many of Unicode's noncharacters and private characters")
    return dict(zip(sorted(map(ord, characters)), free, strict=False))


def _guard(message: Mapping[str, Any], table: Mapping[int, int]) -> dict[str, Any]:
    """A checked message with every string that the user chose translated; its role and its parts' types are known words and stay."""
    guarded: dict[str, Any] = _translate(message, table)
    guarded["role"] = message["role"]
    if isinstance(message["content"], list):
        guarded["content"] = [{**_translate(p, table), "type": p["type"]} for p in message["content"]]
    return guarded


def _translate(value: Any, table: Mapping[int, int]) -> Any:
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, list):
        return [_translate(v, table) for v in value]
    if isinstance(value, Mapping):
        return {k if k in STRUCTURE else _translate(k, table): _translate(v, table) for k, v in value.items()}
    return value


def _num_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_num_characters, inner))


def _told(error: BaseException) -> str:
    return str(error) or type(error).__name__
