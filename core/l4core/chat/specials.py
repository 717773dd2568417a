"""Finding special tokens in text: one regular expression over all of them, linear in the text whatever it spells.

Knows spelling only, nothing of ids. The flags are those of the `tokenizers` library: a token may eat white space on either side, or count
only where it is a word of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from l4core.plugin_api import Piece, Special, Text

LLAMA4_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image|>",
    "<|patch|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|finetune_right_pad|>",
)
"""Those of Llama 4 that mean something, the first one before every text. Tokenizers made here give them ids in this order."""
_NOT_WHITE_SPACE = re.compile(r"\S")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialFlags:
    """lstrip, rstrip: white space before / after the token belongs to it.  single_word: no word character may touch it."""

    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class SpecialTokens:
    """All special tokens of one tokenizer. flags: token → its flags."""

    def __init__(self, flags: Mapping[str, SpecialFlags]) -> None:
        self._flags = dict(flags)
        self._pattern = re.compile(trie_pattern(self._flags)) if self._flags else None

    def __contains__(self, token: object) -> bool:
        return token in self._flags

    def __iter__(self) -> Iterator[str]:
        return iter(self._flags)

    @property
    def telling_characters(self) -> frozenset[str]:
        """First and last character of every special token, and what is neither letter, digit, underscore nor white space in between: <, |, >."""
        borders = {c for token in self._flags for c in (token[0], token[-1])}
        return frozenset(borders | {c for token in self._flags for c in re.findall(r"[^\w\s]", token)})

    def split(self, text: str) -> list[Piece]:
        """`text` as the tokenizer reads it when special tokens are allowed: longest token first, from the left."""
        pieces: list[Piece] = []
        begin = 0
        for match in self._matches(text):
            flags = self._flags[match.group()]
            before = text[begin : match.start()]
            pieces += [Text(before.rstrip() if flags.lstrip else before), Special(match.group())]
            begin = match.end()
            if flags.rstrip:
                begin = _end_of_white_space(text, begin)
        pieces.append(Text(text[begin:]))
        return [p for p in pieces if p != Text("")]

    def _matches(self, text: str) -> Iterator[re.Match[str]]:
        for match in self._pattern.finditer(text) if self._pattern is not None else ():
            if not (self._flags[match.group()].single_word and _touches_word(text, match)):
                yield match


def _touches_word(text: str, match: re.Match[str]) -> bool:
    before, after = text[max(0, match.start() - 1) : match.start()], text[match.end() : match.end() + 1]
    return any(c.isalnum() or c == "_" for c in before + after)


def _end_of_white_space(text: str, begin: int) -> int:
    found = _NOT_WHITE_SPACE.search(text, begin)
    return len(text) if found is None else found.start()


def trie_pattern(tokens: Mapping[str, object]) -> str:
    """A regular expression that matches any of `tokens`, the longest first, trying each character of the text once.

    A plain alternation of Llama 4's 2,048 tokens would try each of them at every "<|".
    """
    root: dict[str, Any] = {}
    for token in tokens:
        node = root
        for character in token:
            node = node.setdefault(character, {})
        node[""] = {}
    return _render(root)


def _render(node: dict[str, Any]) -> str:
    prefix = ""
    while len(node) == 1 and "" not in node:  # a run without branches, in a loop: long tokens must not nest deeply
        ((character, node),) = node.items()
        prefix += re.escape(character)
    branches = [re.escape(c) + _render(child) for c, child in node.items() if c]
    if not branches:
        return prefix
    return f"{prefix}(?:{'|'.join(branches)})" + ("?" if "" in node else "")
