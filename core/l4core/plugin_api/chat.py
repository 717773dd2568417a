"""Chat templates and tool parsers: messages to pieces, and generated text to content and calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["ChatTemplate", "ChatTemplateEntry", "Image", "Piece", "Special", "Text", "ToolCallDelta", "ToolParser"]


@dataclass(frozen=True, slots=True)
class Text:
    """Ordinary text: never becomes a special token, whatever it spells."""

    text: str


@dataclass(frozen=True, slots=True)
class Special:
    """One special token by its exact text, such as `<|eot|>`; unknown to the tokenizer = an error."""

    token: str


@dataclass(frozen=True, slots=True)
class Image:
    """The image of content part `index`, in order of appearance."""

    index: int


Piece: TypeAlias = Text | Special | Image


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """index: which call.  name: set once, when known.  arguments: more JSON text."""

    index: int
    name: str | None = None
    arguments: str = ""


class ToolParser(ABC):
    """Splits generated text into content and tool calls, as it streams."""

    @abstractmethod
    def feed(self, text: str) -> list[str | ToolCallDelta]:
        """More generated text in, content strings and call deltas out."""

    @abstractmethod
    def finish(self) -> list[str | ToolCallDelta]:
        """The text ended; whatever was held back."""


class ChatTemplate(ABC):
    """Turns messages into pieces. Stateless."""

    @abstractmethod
    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
    ) -> list[Piece]:
        """messages: OpenAI's shape (role, content as a string or a list of parts). ValueError → HTTP 400 with its text."""

    def tool_parser(self) -> ToolParser | None:
        """A new parser for one answer, None when this template has no tool calls."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplateEntry:
    """create: "package.module:function" → called with no argument, returns a ChatTemplate. Chosen by `--chat-template NAME`.
    stop_tokens: special tokens that end an answer beside the checkpoint's own eos ids."""

    name: str
    api: int
    create: str
    stop_tokens: tuple[str, ...] = ()
