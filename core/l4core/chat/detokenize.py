"""Token ids → text, as they come. The pieces put together equal the whole decoded at once, and no piece ends inside a character.

Two ways: byte-level tokenizers (Llama 4's) through an incremental UTF-8 decoder, any other by decoding a short window twice.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable

from l4core.chat.tokenizer import Tokenizer, is_byte_token


class Detokenizer(ABC):
    """The text of one sequence, O(1) amortised per token."""

    @abstractmethod
    def add(self, token_ids: Iterable[int]) -> str:
        """More tokens in; the text that is now certain out (may be empty)."""

    @abstractmethod
    def finish(self) -> str:
        """No more tokens: whatever was held back, incomplete characters as U+FFFD."""


def make_detokenizer(tokenizer: Tokenizer, *, skip_special: bool) -> Detokenizer:
    """skip_special: special tokens give no text."""
    made = ByteLevelDetokenizer if tokenizer.is_byte_level else WindowDetokenizer
    return made(tokenizer, skip_special=skip_special)


class ByteLevelDetokenizer(Detokenizer):
    """Each token is a run of bytes; their concatenation is UTF-8 with U+FFFD where it is not."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join(self._tokenizer.token_bytes(i) for i in token_ids if i not in self._skipped))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer(Detokenizer):
    """Decodes the last piece alone and together with the new tokens; the difference is the new text.

    A run of byte-fallback tokens (<0xE2> …) is held back until another token ends it: one bad byte turns the whole run into U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._context: list[
            int
        ] = []  # tokens already told; enough of them that the new ones are decoded as in the whole
        self._held: list[int] = []

    def add(self, token_ids: Iterable[int]) -> str:
        spelled = [(i, self._tokenizer.token(i)) for i in token_ids]
        shown = [(i, t) for i, t in spelled if t is not None and not (self._skip and i in self._tokenizer.special_ids)]
        self._held += [i for i, _ in shown]
        return "" if not shown or is_byte_token(shown[-1][1]) else self.finish()

    def finish(self) -> str:
        before = self._decode(self._context)
        text = self._decode(self._context + self._held)[len(before) :]
        self._context, self._held = (self._held or self._context), []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip) if ids else ""
