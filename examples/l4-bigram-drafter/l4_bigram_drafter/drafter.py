"""Which token followed this one last time? One table for all requests, the oldest entries go first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from l4core.plugin_api import DraftContext, Drafter, DraftRow


class BigramDrafter(Drafter):
    def __init__(self, num_draft_tokens: int, entries: int) -> None:
        self.num_draft_tokens, self.entries = num_draft_tokens, entries
        self.follows: dict[int, int] = {}
        self.seen: dict[str, int] = {}

    def propose(self, rows: Sequence[DraftRow]) -> tuple[torch.Tensor, torch.Tensor]:
        for row in rows:
            self.learn(row)
        guesses = torch.tensor([self.guess(row) for row in rows])
        return guesses, torch.arange(-1, self.num_draft_tokens - 1).expand(len(rows), -1)

    def learn(self, row: DraftRow) -> None:
        tokens = [*row.prompt_token_ids, *row.output_token_ids]
        new = tokens[max(0, self.seen.get(row.request_id, 0) - 1) :]
        self.seen[row.request_id] = len(tokens)
        for token, after in pairwise(new):
            self.follows.pop(token, None)
            self.follows[token] = after
        while len(self.follows) > self.entries:
            del self.follows[next(iter(self.follows))]

    def guess(self, row: DraftRow) -> list[int]:
        token: int = (row.output_token_ids or row.prompt_token_ids)[-1]
        guesses = []
        for _ in range(self.num_draft_tokens):
            token = self.follows.get(token, -1)
            guesses.append(token)
        return guesses

    def forget(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.seen.pop(request_id, None)


def create(context: DraftContext) -> Drafter:
    entries = int(context.options.get("entries", 65536))
    if entries < 1:
        raise ValueError(f"entries is {entries}; wanted at least 1")
    return BigramDrafter(context.num_draft_tokens, entries)
