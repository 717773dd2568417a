"""The shape of chat messages, checked once for every template: known roles, content a string or a list of known parts, plain JSON inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
IMAGE_TYPES = ("image_url", "image")
MAX_MESSAGES = 10_000
MAX_DEPTH = 32
NO_TOOLS = "tool calling is not built yet in this version of L4"
NO_IMAGES = "image input is not built yet in this version of L4"


def check_messages(messages: object) -> list[dict[str, Any]]:
    """A copy made of plain JSON types only. ValueError names the message at fault, what was found and what was wanted."""
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"messages is a {type(messages).__name__}; wanted a list")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise ValueError(f"{len(messages)} messages; wanted 1 to {MAX_MESSAGES}")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The text parts of checked content, put together; images are left out."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def refuse_images(messages: Sequence[Mapping[str, Any]]) -> None:
    """ValueError when checked messages hold an image."""
    contents = [m["content"] for m in messages if not isinstance(m["content"], str)]
    if any(part["type"] in IMAGE_TYPES for content in contents for part in content):
        raise ValueError(NO_IMAGES)


def _check_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is a {type(message).__name__}; wanted an object with role and content")
    plain: dict[str, Any] = _plain(message, where)
    role = plain.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role is {role!r}; wanted one of {', '.join(ROLES)}")
    if plain.get("tool_calls") or plain.get("function_call"):
        raise ValueError(f"{where} has tool calls: {NO_TOOLS}")
    content = plain.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            _check_part(part, f"{where}.content[{i}]")
    elif not isinstance(content, str):
        found = "missing" if "content" not in plain else "null" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{where}.content is {found}; wanted a string or a list of parts")
    return plain


def _check_part(part: object, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise ValueError(f'{where} is not a content part; wanted an object such as {{"type": "text", "text": "…"}}')
    if kind not in ("text", *IMAGE_TYPES):
        raise ValueError(f"{where}.type is {kind!r}; wanted text or {' or '.join(IMAGE_TYPES)}")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"{where}.text is a {type(part.get('text')).__name__}; wanted a string")


def _plain(value: object, where: str, depth: int = 0) -> Any:
    """A copy of `value` in exact JSON types, so that a sandboxed template meets no other object."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested deeper than {MAX_DEPTH}")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, where, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, where, depth + 1) for v in value]
    raise ValueError(f"{where} holds a {type(value).__name__}; wanted plain JSON")
