"""A step's batch while the scheduler chooses it, and the batch in flight until its tokens are taken in. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import numpy as np

from l4core.engine.batch import (
    PENDING,
    Decodes,
    DecodesFirst,
    DrawnTokens,
    NewPages,
    ScheduledBatch,
    ScheduledSequence,
    StepTokens,
)
from l4core.engine.schedule.sequence import NO_ROW, SequenceState

Part: TypeAlias = tuple[SequenceState, ScheduledSequence]
"""A sequence, and what a step computes of it."""
Decoded: TypeAlias = tuple[Sequence[SequenceState], Sequence[int]]
"""Sequences that decoded, and the token of each."""


class Choice:
    """decodes: sequences that decode without guesses, each with a slot for its token.  new_pages: by row, of those that have any.
    drafts, pieces: the other parts. One that is evicted after it was chosen loses its row, and so its place."""

    def __init__(self) -> None:
        self.decodes: list[SequenceState] = []
        self.new_pages: dict[int, Mapping[str, NewPages]] = {}
        self.drafts: list[Part] = []
        self.pieces: list[Part] = []

    def holds(self, seq: SequenceState) -> bool:
        """Whether something of the sequence is chosen. O(chosen): asked when memory is short."""
        return any(seq is other for other in chain(self.decodes, (s for s, _ in chain(self.drafts, self.pieces))))

    def launch(self, step: int, *, is_alone: bool) -> Flight | None:
        """The batch, whose tokens count as computed from now on; None when nothing is chosen. is_alone: no batch is in flight, so that the host knows
        every token."""
        decodes = [seq for seq in self.decodes if seq.row != NO_ROW]
        others = [part for part in chain(self.drafts, self.pieces) if part[0].row != NO_ROW]
        if not decodes and not others:
            return None
        token_ids = [seq.output_token_ids[-1] for seq in decodes] if is_alone else list(map(last_token, decodes))
        columns = Decodes(
            rows=np.array([seq.row for seq in decodes], dtype=np.int64),
            starts=np.array([seq.num_tokens for seq in decodes], dtype=np.int64) - 1,
            token_ids=np.array(token_ids, dtype=np.int64),
            new_pages=self.new_pages,
            states=decodes,
        )
        for seq in decodes:  # `SequenceState.advance`, of a decode
            seq.num_tokens += 1
        for seq, entry in others:
            seq.advance(entry)
        batch = ScheduledBatch(step=step, sequences=DecodesFirst(columns, [entry for _, entry in others]))
        return Flight(decodes=decodes, others=others, batch=batch)


def last_token(seq: SequenceState) -> int:
    """The token drawn last, PENDING while a batch in flight draws it."""
    return PENDING if seq.num_pending else seq.output_token_ids[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A batch that is not committed yet, and whose it is."""

    decodes: Sequence[SequenceState]
    others: Sequence[Part]
    batch: ScheduledBatch

    @property
    def parts(self) -> Iterator[Part]:
        """All of it, in the batch's order."""
        states = chain(self.decodes, (seq for seq, _ in self.others))
        return zip(states, self.batch.sequences, strict=True)

    def divide(self, tokens: StepTokens) -> tuple[Decoded, Iterator[tuple[Part, DrawnTokens]]]:
        """→ (decodes with their tokens, the other parts with what they drew). ValueError when not all came."""
        if tokens.decoded is None or len(tokens.decoded) == len(self.decodes):
            decoded, rest = self._decoded(tokens.decoded)
            if len(tokens.drawn) == len(rest):
                return decoded, zip(rest, tokens.drawn, strict=True)
        found = f"{len(tokens.drawn)} draws" + ("" if tokens.decoded is None else f" and {len(tokens.decoded)} tokens")
        raise ValueError(
            f"{found} came for {len(self.batch.sequences)} scheduled sequences, {len(self.decodes)} decodes among them"
        )

    def _decoded(self, token_ids: Sequence[int] | None) -> tuple[Decoded, Sequence[Part]]:
        if token_ids is None:
            return ((), ()), list(self.parts)
        if min(token_ids, default=0) >= 0:
            return (self.decodes, token_ids), self.others
        here = [i for i, token_id in enumerate(token_ids) if token_id >= 0]
        away = [(seq, self.batch.sequences[i]) for i, seq in enumerate(self.decodes) if token_ids[i] < 0]
        return ([self.decodes[i] for i in here], [token_ids[i] for i in here]), [*away, *self.others]


NO_FLIGHT = Flight(decodes=(), others=(), batch=ScheduledBatch(step=0, sequences=()))
"""In place of a flight where there is none."""
