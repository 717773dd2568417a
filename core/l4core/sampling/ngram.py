"""The drafter `NGRAM`: what followed the last time the sequence ended like this? Needs no weights; good at text that quotes its own prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from l4core.plugin_api import DraftContext, Drafter, DraftRow

__all__ = ["NgramDrafter", "create"]


class _History:
    """One sequence's tokens (the last `window` of them, or up to twice as many), and where each of its n-grams was last followed by a token."""

    def __init__(self, sizes: range, window: int) -> None:
        self._sizes, self._window = sizes, window
        self._follows: dict[tuple[int, ...], int] = {}
        self._tokens: list[int] = []
        self.num_seen = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        self.num_seen += len(token_ids)
        tokens = self._tokens
        for token_id in token_ids:
            end = len(tokens)
            for size in self._sizes:
                if size <= end:
                    self._follows[tuple(tokens[end - size : end])] = end
            tokens.append(token_id)
        if len(tokens) > 2 * self._window:
            kept, self._tokens, self._follows = tokens[-self._window :], [], {}
            self.num_seen -= len(kept)
            self.extend(kept)

    def guess(self, count: int) -> list[int]:
        """What followed the longest ending that occurred before; where that runs into the end, it goes on with the guesses themselves."""
        tokens = self._tokens
        for size in reversed(self._sizes):
            at = self._follows.get(tuple(tokens[-size:]))
            if size <= len(tokens) and at is not None:
                period, text = len(tokens) - at, tokens[at : at + count]
                for i in range(len(text), count):
                    text.append(text[i - period])
                return text
        return []


class NgramDrafter(Drafter):
    """Remembers an index of each sequence: about 100 bytes a token and n-gram length, within the window."""

    def __init__(self, *, num_draft_tokens: int, longest: int = 4, shortest: int = 2, window: int = 32768) -> None:
        if not 1 <= shortest <= longest <= window:
            raise ValueError(
                f"shortest is {shortest}, longest {longest}, window {window}; wanted 1 ≤ shortest ≤ longest ≤ window"
            )
        self._num_draft_tokens, self._sizes, self._window = num_draft_tokens, range(shortest, longest + 1), window
        self._histories: dict[str, _History] = {}

    def propose(self, rows: Sequence[DraftRow]) -> tuple[torch.Tensor, torch.Tensor]:
        chain = torch.arange(-1, self._num_draft_tokens - 1)
        guesses = torch.full((len(rows), self._num_draft_tokens), -1)
        for row, own in zip(rows, guesses, strict=True):
            found = self._history(row).guess(min(row.max_tokens, self._num_draft_tokens))
            own[: len(found)] = torch.tensor(found, dtype=torch.int64)
        return guesses, chain.expand(len(rows), -1)

    def forget(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._histories.pop(request_id, None)

    def _history(self, row: DraftRow) -> _History:
        history = self._histories.get(row.request_id)
        if history is None:
            history = self._histories[row.request_id] = _History(self._sizes, self._window)
            history.extend(row.prompt_token_ids)
        history.extend(row.output_token_ids[history.num_seen - len(row.prompt_token_ids) :])
        return history


def create(context: DraftContext) -> Drafter:
    """What the entry of the drafter `NGRAM` names. ValueError for an option that is no whole number or out of range."""
    for name, value in context.options.items():
        if not value.isdecimal():
            raise ValueError(f"--speculative-option {name}={value}; wanted a whole number of tokens")
    return NgramDrafter(
        num_draft_tokens=context.num_draft_tokens, **{name: int(value) for name, value in context.options.items()}
    )
