"""A drafter that knows the answers beforehand, for tests and benchmarks of speculation at a chosen acceptance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch

from l4core.plugin_api import Drafter, DraftRow

__all__ = ["RecordedDrafter"]


class RecordedDrafter(Drafter):
    """Guesses what was recorded, right with a probability and the next id otherwise; each guess's coin is a function of prompt, seed and position.

    answers: row → its whole answer, as an earlier run without speculation gave it.  acceptance: row → probability that a guess is right.
    branches: guesses a level of the tree, of which one is the recorded token when the coin says so; 1 = a chain.
    """

    def __init__(
        self,
        answers: Callable[[DraftRow], Sequence[int]],
        acceptance: Callable[[DraftRow], float],
        *,
        num_draft_tokens: int,
        vocab_size: int,
        branches: int = 1,
    ) -> None:
        self._answers, self._acceptance = answers, acceptance
        self._num, self._vocab_size, self._branches = num_draft_tokens, vocab_size, branches

    def propose(self, rows: Sequence[DraftRow]) -> tuple[torch.Tensor, torch.Tensor]:
        guesses = torch.full((len(rows), self._num), -1)
        parents = torch.full((len(rows), self._num), -1)
        for row, own, before in zip(rows, guesses, parents, strict=True):
            tokens, links = self._guess(row)
            own[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            before[: len(links)] = torch.tensor(links, dtype=torch.int64)
        return guesses, parents

    def _guess(self, row: DraftRow) -> tuple[list[int], list[int]]:
        """Level after level: `branches` guesses under one guess of the level before, the recorded token at a place that depends on the position."""
        answer, acceptance = self._answers(row), self._acceptance(row)
        tokens: list[int] = []
        links: list[int] = []
        parent, position = -1, len(row.output_token_ids)
        while len(tokens) < min(row.max_tokens, self._num) and position < len(answer):
            count = min(self._branches, row.max_tokens - len(tokens), self._num - len(tokens))
            coin = _coin(row, position)
            right = int(coin * 1e6) % count
            level = [(answer[position] + 1 + (i - right) % count) % self._vocab_size for i in range(count)]
            if coin < acceptance:
                level[right] = answer[position]
            parent, begin = len(tokens) + right, parent
            tokens += level
            links += [begin] * count
            position += 1
        return tokens, links


def _coin(row: DraftRow, position: int) -> float:
    text = f"{list(row.prompt_token_ids[-8:])} {len(row.prompt_token_ids)} {row.params.seed} {position}"
    return int.from_bytes(blake2b(text.encode(), digest_size=6).digest(), "little") / 2**48
