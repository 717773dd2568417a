"""The engine's logprobs (ids) in the three shapes of the API (texts): chat's, completions', and the prompt_logprobs extension."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from l4core.chat.detokenize import make_detokenizer
from l4core.chat.tokenizer import Tokenizer
from l4core.request import TokenLogprobs
from l4core.server.replies import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)

LEAST_LOGPROB = -9999.0
"""Stands for −inf, which JSON cannot spell (OpenAI's convention)."""


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprobs], num_top: int) -> ChatLogprobs:
    """num_top: entries of top_logprobs."""
    return ChatLogprobs([_chat_token(tokenizer, entry, num_top) for entry in entries])


def _chat_token(tokenizer: Tokenizer, entry: TokenLogprobs, num_top: int) -> ChatTokenLogprob:
    text, raw = _spell(tokenizer, entry.token_id)
    top = [TopLogprob(*_named(tokenizer, token_id, logprob)) for token_id, logprob in entry.top[:num_top]]
    return ChatTokenLogprob(text, _finite(entry.logprob), raw, top)


def _named(tokenizer: Tokenizer, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
    text, raw = _spell(tokenizer, token_id)
    return text, _finite(logprob), raw


def prompt_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs | None], num_top: int) -> PromptLogprobs:
    """Per prompt token: id → candidate, the token itself first; null for the first token."""
    return [None if entry is None else _candidates(tokenizer, entry, num_top) for entry in entries]


def _candidates(tokenizer: Tokenizer, entry: TokenLogprobs, num_top: int) -> dict[int, PromptLogprob]:
    ranked = {entry.token_id: (entry.logprob, entry.rank)}
    for rank, (token_id, logprob) in enumerate(entry.top[:num_top], start=1):
        ranked.setdefault(token_id, (logprob, rank))
    return {
        token_id: PromptLogprob(logprob=_finite(logprob), rank=rank, decoded_token=tokenizer.token_text(token_id))
        for token_id, (logprob, rank) in ranked.items()
    }


class CompletionLogprobShaper:
    """Of one answer; keeps count of the characters so far, as they are in the answer's text (hidden special tokens have none)."""

    def __init__(self, tokenizer: Tokenizer, *, num_top: int, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._detokenizer = make_detokenizer(tokenizer, skip_special=skip_special)
        self._offset = 0

    def shape(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """The next tokens, with their logprobs (None for a prompt's first)."""
        return CompletionLogprobs(
            tokens=[self._tokenizer.token_text(i) for i in token_ids],
            token_logprobs=[None if entry is None else _finite(entry.logprob) for entry in entries],
            top_logprobs=[None if entry is None else self._top(entry) for entry in entries],
            text_offset=[self._advance(i) for i in token_ids],
        )

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Text → logprob, best first. Where two tokens have one text, the better counts: its value is what "greedy?" is judged by."""
        found: dict[str, float] = {}
        for token_id, logprob in [*entry.top[: self._num_top], (entry.token_id, entry.logprob)]:
            found.setdefault(self._tokenizer.token_text(token_id), _finite(logprob))
        return found

    def _advance(self, token_id: int) -> int:
        before = self._offset
        self._offset += len(self._detokenizer.add([token_id]))
        return before


def _spell(tokenizer: Tokenizer, token_id: int) -> tuple[str, list[int]]:
    return tokenizer.token_text(token_id), list(tokenizer.token_bytes(token_id))


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
