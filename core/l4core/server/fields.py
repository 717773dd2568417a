"""Which field names a body may have: known, harmless, not built yet, or refused with the nearest known name. Nothing is ignored in silence."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec

from l4core.chat.messages import MAX_MESSAGES
from l4core.errors import RequestError

MAX_PARTS = 10_000
"""Content parts of one conversation."""
MAX_NAME = 64
"""Characters of an unknown name up to which a similar one is looked for: the search takes seconds on a name of megabytes."""

HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
"""Accepted and without effect: they are for the provider's own bookkeeping, or matter only beside a field that is refused."""

NOT_BUILT: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "regex": (),
    "ebnf": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "truncate_prompt_tokens": (),
    "lora_path": (),
    "logits_processors": (),
    "tool_calls": ([],),
    "refusal": (),
}
"""Field → the values that mean "off", accepted; any other is refused as not built yet. null always means off."""

MESSAGE_HARMLESS = frozenset({"name", "annotations", "provider_specific_fields"})
MESSAGE_NOT_BUILT: Mapping[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "function_call": (),
    "refusal": ("",),
    "audio": (),
    "reasoning": ("",),
    "reasoning_content": ("",),
}
PARTS_NOT_BUILT = frozenset({"image_url", "input_audio", "file", "video_url", "audio_url", "refusal"})


def check_fields(raw: Mapping[str, Any], wanted: type[msgspec.Struct]) -> None:
    """The names of a body meant as a `wanted`, and of its messages. Raises RequestError (400) with the field in `param`."""
    known = _names_of(wanted)
    _check_names(raw, known, HARMLESS, NOT_BUILT, "")
    messages = raw.get("messages")
    if "messages" in known and isinstance(messages, list):
        _check_counts(messages)
        for index, message in enumerate(messages):
            if isinstance(message, dict):
                _check_message(message, f"messages[{index}].")


@functools.cache
def _names_of(wanted: type[msgspec.Struct]) -> frozenset[str]:
    """Kept: to look at a struct's fields takes as long as to parse a hundred bodies."""
    return frozenset(field.encode_name for field in msgspec.structs.fields(wanted))


def _check_counts(messages: list[Any]) -> None:
    """Before any of them is looked at: this runs where all the other streams wait."""
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"{len(messages)} messages; wanted 1 to {MAX_MESSAGES}", param="messages")
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    num_parts = sum(len(content) for content in contents if isinstance(content, list))
    if num_parts > MAX_PARTS:
        raise RequestError(f"the messages have {num_parts} content parts; at most {MAX_PARTS}", param="messages")


def _check_message(message: Mapping[str, Any], where: str) -> None:
    _check_names(message, {"role", "content", "tool_call_id"}, MESSAGE_HARMLESS, MESSAGE_NOT_BUILT, where)
    content = message.get("content")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in PARTS_NOT_BUILT:
            raise _not_built(f"{where}content[{index}].type", kind)


def _check_names(
    raw: Mapping[str, Any],
    known: AbstractSet[str],
    harmless: frozenset[str],
    not_built: Mapping[str, tuple[Any, ...]],
    where: str,
) -> None:
    for name, value in raw.items():
        if name in known or name in harmless or (name in not_built and value is None):
            continue
        if name not in not_built:
            near = difflib.get_close_matches(name, known, n=1) if len(name) <= MAX_NAME else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RequestError(f"unknown field {where + name!r}{hint}", param=where + name, code="unknown_field")
        if not any(_same(value, off) for off in not_built[name]):
            raise _not_built(where + name, value)


def _same(value: Any, off: Any) -> bool:
    """JSON's equality: 0 is not false."""
    return bool(value == off) and isinstance(value, bool) == isinstance(off, bool)


def _not_built(param: str, value: Any) -> RequestError:
    shown = repr(value) if len(repr(value)) <= 60 else f"a {type(value).__name__}"
    return RequestError(f"{param}: {shown} is not built yet in this version of L4", param=param, code="not_built")
