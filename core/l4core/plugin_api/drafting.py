"""Drafters: guesses of the tokens to come, which the target verifies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from l4core.request import SamplingParams

if TYPE_CHECKING:
    import logging

    import torch

__all__ = ["DraftContext", "DraftRow", "Drafter", "DrafterEntry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftContext:
    """Handed to a drafter's `create`. num_draft_tokens: guesses a sequence may be given in one step.  device: torch device string.
    options: what the user set with `--speculative-option key=value`."""

    vocab_size: int
    num_draft_tokens: int
    device: str
    options: Mapping[str, str]
    logger: logging.Logger


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRow:
    """One sequence that waits for its next token. Token ids are its own, all of them; output_token_ids grows between steps and is never rewritten.
    max_tokens: guesses that can be used, at least 1."""

    request_id: str
    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    max_tokens: int


class Drafter(ABC):
    """Proposes tokens that the target then verifies. Whatever it proposes, the emitted tokens are the target's own. One that raises is not asked
    again, and the log says so."""

    @abstractmethod
    def propose(self, rows: Sequence[DraftRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """→ token_ids, parents: int64 [len(rows), K], K at most num_draft_tokens. A token id of −1 ends its row's draft. parents: index of the
        guess before in the same row, −1 = the last committed token; always smaller than the guess's own index. A chain's are −1, 0, 1, …"""

    def forget(self, request_ids: Sequence[str]) -> None:  # noqa: B027  (most drafters remember nothing)
        """These requests have ended; what is remembered of them may go. Unknown ids are no error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterEntry:
    """create: "package.module:function" → called with a DraftContext, returns a Drafter. Chosen by `--speculative-algorithm NAME`.
    options: names that `--speculative-option` may set, with one line of help each.  trees: may propose more than a chain."""

    name: str
    api: int
    create: str
    options: Mapping[str, str] = field(default_factory=dict)
    trees: bool = False
