"""What asks a drafter for guesses, and keeps a drafter that fails from doing harm. Whatever is guessed, the tokens are the target's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING, Protocol

import torch

from l4core.engine.batch import NO_DRAFT, Draft, DraftRequest, ScheduledBatch, ScheduledSequence, StepTokens
from l4core.engine.run.padding import AuxRows
from l4core.plugin_api import Drafter, DraftRow

if TYPE_CHECKING:
    from l4core.engine.run.draws import PendingDraws
    from l4core.engine.run.runner import Runner
    from l4core.engine.run.verify_rows import Verified

logger = logging.getLogger(__name__)


class Speculation(Protocol):
    """What `Engine.step` calls. num_drafts: how many tokens ahead to guess in the next step, 0 = not now; max_drafts: at most so many.
    num_slots: KV slots behind a sequence's tokens that it needs while it guesses."""

    num_drafts: int
    max_drafts: int
    num_slots: int

    def want(self, num_drafts: int, *, reads: bool) -> None:
        """From now on: `num_drafts` at most max_drafts.  reads: with none, whether it is to read along, so that it can go on guessing."""

    @property
    def reads_target(self) -> bool:
        """Whether it wants to be shown the next step."""

    @property
    def num_guesses(self) -> int:
        """Guesses that a sequence may be given in the next step: more than num_drafts where they branch."""

    def propose(self, requests: Sequence[DraftRequest], *, late: bool = False) -> Mapping[str, Draft]:
        """Request id → its draft, for those that get one. late: the guesses may be PENDING, on their way into `Runner.pending`; then the host has not
        waited for the device, and `known` tells them once the next step has been launched."""

    def known(self, batch: ScheduledBatch) -> ScheduledBatch:
        """The batch launched after the last `propose`, with the guesses that were PENDING in it."""

    def observe(self, batch: ScheduledBatch, aux: AuxRows, verified: Sequence[Verified]) -> None:
        """Called after every step when `reads_target`. aux: outputs of the model's `aux_layers`, side by side, for the batch's rows."""

    def forget(self, request_ids: Sequence[str]) -> None:
        """These requests have ended."""


class SettledDraws:
    """Draws under way of a batch that needs more than their tokens: keys and values of accepted tree nodes move to their places, and a drafter that
    reads the target is shown what it computed and drew."""

    def __init__(
        self,
        draws: PendingDraws,
        runner: Runner,
        speculation: Speculation,
        batch: ScheduledBatch,
        aux: AuxRows | None,
        holds: Callable[[ScheduledSequence], bool],
    ) -> None:
        """holds: whether a sequence still has its row. One that has ended or was evicted since must not be written for: its pages are another's."""
        self._draws, self._runner, self._speculation, self._batch, self._aux = draws, runner, speculation, batch, aux
        self._holds = holds

    def wait(self) -> StepTokens:
        """What the batch brought."""
        batch = self._speculation.known(self._batch) if self._batch.num_verified else self._batch
        verified = self._draws.verified(batch.sequences)
        tokens = StepTokens(drawn=[one.tokens for one in verified])
        held, aux = [self._holds(seq) for seq in batch.sequences], self._aux
        if not any(held):
            return tokens
        if not all(held):
            batch, aux, verified = _only(held, batch, aux, verified)
        self._runner.settle(batch, verified)
        if self._speculation.reads_target:
            assert aux is not None
            self._speculation.observe(batch, aux, verified)
        return tokens


def _only(
    wanted: Sequence[bool], batch: ScheduledBatch, aux: AuxRows | None, verified: Sequence[Verified]
) -> tuple[ScheduledBatch, AuxRows | None, list[Verified]]:
    """The same step as if it had had the wanted sequences only."""
    sequences = list(compress(batch.sequences, wanted))
    if aux is not None:
        sizes = [len(seq.token_ids) for seq in batch.sequences]
        aux = AuxRows(values=torch.cat(list(compress(torch.split(aux.packed(sizes), sizes), wanted))))
    return replace(batch, sequences=sequences), aux, list(compress(verified, wanted))


class PluginSpeculation:
    """Asks a plugin's drafter. One that raises, or answers nonsense, is logged and not asked again."""

    reads_target = False
    num_slots = 0

    def __init__(self, name: str, drafter: Drafter, *, num_drafts: int, vocab_size: int, trees: bool = False) -> None:
        """trees: it may propose more than chains."""
        self.num_drafts = self.max_drafts = num_drafts
        self._name, self._drafter, self._vocab_size = name, drafter, vocab_size
        self._num_drafts, self._trees = num_drafts, trees

    def want(self, num_drafts: int, *, reads: bool) -> None:
        """Tokens are all that it reads, when it is asked."""
        self.num_drafts = min(num_drafts, self.max_drafts)

    @property
    def num_guesses(self) -> int:
        return self.num_drafts

    def propose(self, requests: Sequence[DraftRequest], *, late: bool = False) -> Mapping[str, Draft]:
        """Its guesses are the host's, never late."""
        if not requests:
            return {}
        rows = [
            DraftRow(
                request_id=wanted.request.request_id,
                params=wanted.request.params,
                prompt_token_ids=wanted.request.prompt_token_ids,
                output_token_ids=wanted.output_token_ids,
                max_tokens=wanted.max_drafts,
            )
            for wanted in requests
        ]
        try:
            drafts = drafts_of(*self._drafter.propose(rows), len(rows), self._num_drafts, self._vocab_size)
            if not self._trees and any(draft.parents for draft in drafts):
                raise ValueError("propose returned a tree; its entry does not say trees=True")
        except Exception:
            logger.exception("drafter %r failed; it is not asked again, answers go on without it", self._name)
            self.num_drafts = self.max_drafts = 0
            return {}
        return {row.request_id: draft for row, draft in zip(rows, drafts, strict=True) if draft.token_ids}

    def known(self, batch: ScheduledBatch) -> ScheduledBatch:
        return batch

    def observe(self, batch: ScheduledBatch, aux: AuxRows, verified: Sequence[Verified]) -> None:
        raise AssertionError("a plugin's drafter sees tokens only")

    def forget(self, request_ids: Sequence[str]) -> None:
        try:
            self._drafter.forget(request_ids)
        except Exception:
            logger.exception("drafter %r failed; it is not asked again, answers go on without it", self._name)
            self.num_drafts = self.max_drafts = 0


def drafts_of(
    token_ids: torch.Tensor, parents: torch.Tensor, num_rows: int, num_drafts: int, vocab_size: int
) -> list[Draft]:
    """What `Drafter.propose` returned, as drafts. ValueError for a shape, token id or parent that it may not return."""
    shape = tuple(token_ids.shape)
    if len(shape) != 2 or shape[0] != num_rows or shape[1] > num_drafts or tuple(parents.shape) != shape:
        raise ValueError(
            f"propose returned token_ids {list(shape)} and parents {list(parents.shape)}; wanted [{num_rows}, at most {num_drafts}] twice"
        )
    return [_draft(own, before, vocab_size) for own, before in zip(token_ids.tolist(), parents.tolist(), strict=True)]


def _draft(token_ids: list[int], parents: list[int], vocab_size: int) -> Draft:
    count = token_ids.index(-1) if -1 in token_ids else len(token_ids)
    if count == 0:
        return NO_DRAFT
    own, before = token_ids[:count], parents[:count]
    if min(own) < 0 or max(own) >= vocab_size:
        raise ValueError(f"propose guessed token ids {own}; wanted −1, or ids from 0 to {vocab_size - 1}")
    if before == list(range(-1, count - 1)):
        return Draft(token_ids=own)
    if any(not -1 <= parent < i for i, parent in enumerate(before)):
        raise ValueError(f"propose returned parents {before}; wanted each from −1 to its own index − 1")
    return Draft(token_ids=own, parents=before)
