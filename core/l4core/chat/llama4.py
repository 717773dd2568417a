"""The built-in template `llama-4`: what Llama 4's published chat template writes, as pieces (docs/decisions/002-chat-template.md).

Tool definitions, tool calls and a tool parser are not here yet: asking for them is an error.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from l4core.chat.messages import IMAGE_TYPES, NO_IMAGES, NO_TOOLS, check_messages, text_of
from l4core.plugin_api import ChatTemplate, Image, Piece, Special, Text

BEGIN, HEADER_START, HEADER_END, END_OF_TURN = (
    Special("<|begin_of_text|>"),
    Special("<|header_start|>"),
    Special("<|header_end|>"),
    Special("<|eot|>"),
)
HEADER_NAMES = {"developer": "system", "tool": "ipython"}
"""Roles the model knows under another name."""


class Llama4Template(ChatTemplate):
    """`<|begin_of_text|>`, then `<|header_start|>role<|header_end|>`, a blank line, the content and `<|eot|>` per message."""

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
    ) -> list[Piece]:
        if tools:
            raise ValueError(NO_TOOLS)
        images = itertools.count()
        pieces: list[Piece] = [BEGIN]
        for i, message in enumerate(check_messages(messages)):
            pieces += _turn(message, is_first=i == 0, images=images)
        return pieces + (_header("assistant") if add_generation_prompt else [])


def create() -> Llama4Template:
    """What the plugin entry `llama-4` names."""
    return Llama4Template()


def _turn(message: Mapping[str, Any], *, is_first: bool, images: Iterator[int]) -> list[Piece]:
    role = HEADER_NAMES.get(message["role"], message["role"])
    if is_first and role == "system":
        body: list[Piece] = [Text(_only_text(message).strip())]
    elif role == "ipython":
        _only_text(message)
        body = [Text(json.dumps(message["content"], ensure_ascii=False))]
    else:
        body = _body(message["content"], images)
    return [*_header(role), *body, END_OF_TURN]


def _header(role: str) -> list[Piece]:
    return [HEADER_START, Text(role), HEADER_END, Text("\n\n")]


def _body(content: str | list[dict[str, Any]], images: Iterator[int]) -> list[Piece]:
    if isinstance(content, str):
        return [Text(content)]
    return [Text(part["text"]) if part["type"] == "text" else Image(next(images)) for part in content]


def _only_text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if not isinstance(content, str) and any(part["type"] in IMAGE_TYPES for part in content):
        raise ValueError(f"an image in a {message['role']} message: {NO_IMAGES}")
    return text_of(content)
