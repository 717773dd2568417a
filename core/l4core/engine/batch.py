"""What passes between the rooms of a step: scheduler → runner (`ScheduledBatch`), runner → model (`ForwardBatch`), model → scheduler (`StepTokens`).

Frozen records. The scheduler's side holds plain integers; the model's side holds device tensors. Those made once per sequence and step are
msgspec structs: creating one takes a fourteenth of the time of a frozen dataclass, and the garbage collector need not look at it. Nearly all
sequences of a busy step only decode: they are columns, and nothing is made for each (`Decodes`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Protocol, TypeAlias, overload

import msgspec
import numpy as np
import numpy.typing as npt

from l4core.request import Request, TokenLogprobs

Ints: TypeAlias = npt.NDArray[np.int64]
PENDING = -1
"""In place of a token id that the device knows and the host may not: of the token that the sequence drew last, of a guess of what follows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPages:
    """Block-table entries to write before this step: pages[i] is the page of page index `first_index + i` (index = position // page_size)."""

    first_index: int
    pages: Sequence[int]


class ScheduledSequence(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request's part of a step: tokens [start, start + len(token_ids)) are computed; their KV slots are already reserved.

    row: the request's row in the persistent block tables, its own from admission to end or preemption.  new_pages: KV group name → entries
    that changed since the request was last scheduled.  draws: the last token's logits give a new token (False while the prompt is unfinished).
    token_ids: [PENDING] for a decode after a batch that is still in flight; guesses that the device makes just before are PENDING too.
    num_drafts: how many of token_ids, the last ones, are guesses to verify.  parents: of each guess, as in `Draft`; empty = a chain.
    output_token_ids: all known so far, as a view of the scheduler's own list: read it before `commit`, which appends to it.
    """

    request: Request
    row: int
    start: int
    token_ids: Sequence[int]
    new_pages: Mapping[str, NewPages]
    draws: bool
    is_decode: bool
    output_token_ids: Sequence[int] = ()
    num_drafts: int = 0
    parents: Sequence[int] = ()


class DecodingState(Protocol):
    """What is asked of the owner of a sequence when a record of its part of a step is wanted."""

    @property
    def request(self) -> Request: ...
    @property
    def output_token_ids(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decodes:
    """Sequences of a step that compute the token they drew last and draw the next one, without guesses. rows, starts, token_ids: int64 [N], as in
    ScheduledSequence.  new_pages: by row, of those that have any.  states: whose they are."""

    rows: Ints
    starts: Ints
    token_ids: Ints
    new_pages: Mapping[int, Mapping[str, NewPages]]
    states: Sequence[DecodingState]

    def record(self, index: int) -> ScheduledSequence:
        """One of them, as the others of its step are."""
        state, row = self.states[index], int(self.rows[index])
        return ScheduledSequence(
            request=state.request,
            row=row,
            start=int(self.starts[index]),
            token_ids=(int(self.token_ids[index]),),
            new_pages=self.new_pages.get(row, {}),
            draws=True,
            is_decode=True,
            output_token_ids=state.output_token_ids,
        )


_NO_INTS = np.empty(0, dtype=np.int64)
NO_DECODES = Decodes(rows=_NO_INTS, starts=_NO_INTS, token_ids=_NO_INTS, new_pages={}, states=())


class DecodesFirst(Sequence[ScheduledSequence]):
    """A step's sequences, of which the first are kept as columns. Whoever looks at one gets its record, made then."""

    def __init__(self, decodes: Decodes, others: Sequence[ScheduledSequence]) -> None:
        self.decodes, self.others = decodes, others

    def __len__(self) -> int:
        return len(self.decodes.states) + len(self.others)

    @overload
    def __getitem__(self, index: int) -> ScheduledSequence: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ScheduledSequence]: ...
    def __getitem__(self, index: int | slice) -> ScheduledSequence | Sequence[ScheduledSequence]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        behind = range(len(self))[index] - len(self.decodes.states)  # IndexError beyond the last
        return self.others[behind] if behind >= 0 else self.decodes.record(behind + len(self.decodes.states))


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """A whole step as columns, int64 [N] each: rows, starts, lengths, and num_draws, of how many of its last tokens each sequence draws what follows.
    borders: sequences [borders[i], borders[i + 1]) are the step's decodes, drafts and prompts.  token_ids: int64 [sum of lengths]."""

    rows: Ints
    starts: Ints
    lengths: Ints
    num_draws: Ints
    token_ids: Ints
    borders: tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class ScheduledBatch:
    """Decodes first, then decodes with drafts, then prefill pieces; a piece never crosses a chunk border. step: counts scheduled batches.
    sequences: a list, or DecodesFirst."""

    step: int
    sequences: Sequence[ScheduledSequence]

    @property
    def decodes(self) -> Decodes:
        """Those kept as columns: all decodes where the scheduler made the batch, none where it is a list."""
        return self.sequences.decodes if isinstance(self.sequences, DecodesFirst) else NO_DECODES

    @property
    def others(self) -> Sequence[ScheduledSequence]:
        """Those behind `decodes`."""
        return self.sequences.others if isinstance(self.sequences, DecodesFirst) else self.sequences

    @cached_property
    def columns(self) -> Columns:
        """All of them as columns, made once."""
        decodes, others = self.decodes, self.others
        num = len(decodes.states)
        ones = np.ones(num, dtype=np.int64)
        if not others:
            return Columns(
                rows=decodes.rows,
                starts=decodes.starts,
                lengths=ones,
                num_draws=ones,
                token_ids=decodes.token_ids,
                borders=(0, num, num, num),
            )
        return Columns(
            rows=_joined(decodes.rows, [s.row for s in others]),
            starts=_joined(decodes.starts, [s.start for s in others]),
            lengths=_joined(ones, [len(s.token_ids) for s in others]),
            num_draws=_joined(ones, [s.draws + s.num_drafts for s in others]),
            token_ids=_joined(decodes.token_ids, list(chain.from_iterable([s.token_ids for s in others]))),
            borders=(0, self.num_decodes, self.num_decodes + self.num_verified, len(self.sequences)),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.decodes.states) + sum(len(s.token_ids) for s in self.others)

    @property
    def num_decodes(self) -> int:
        """Sequences of one row."""
        return len(self.decodes.states) + sum(s.is_decode and not s.num_drafts for s in self.others)

    @property
    def num_verified(self) -> int:
        """Sequences with drafts."""
        return sum(s.num_drafts > 0 for s in self.others)

    @property
    def with_new_pages(self) -> list[ScheduledSequence]:
        """The sequences whose block tables have changed."""
        decodes = self.decodes
        where = (
            [i for i, row in enumerate(decodes.rows.tolist()) if row in decodes.new_pages] if decodes.new_pages else ()
        )
        return [*map(decodes.record, where), *(s for s in self.others if s.new_pages)]


def _joined(first: Ints, rest: list[int]) -> Ints:
    """rest: a list, from which an array is made in half the time that a generator takes."""
    return np.concatenate((first, np.array(rest, dtype=np.int64)))


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """Guesses of what follows a sequence's last token. parents[i]: index of the guess before guess i, −1 = the last token; smaller than i, so that
    any first part of a draft is a draft. Empty parents: a chain, each guess follows the one before."""

    token_ids: Sequence[int] = ()
    parents: Sequence[int] = ()


NO_DRAFT = Draft()


class DraftRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A decoding sequence that may be given a draft of up to max_drafts tokens. It has num_tokens tokens, all but the last computed, and slots for
    the draft; new_pages: block-table entries for them.  room: slots it has behind its tokens.  output_token_ids: a view, as in ScheduledSequence."""

    request: Request
    row: int
    num_tokens: int
    output_token_ids: Sequence[int]
    max_drafts: int
    new_pages: Mapping[str, NewPages]
    room: int = 0


class DrawnTokens(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The tokens drawn for one scheduled sequence: none while its prompt is unfinished, one, or one more than drafts were accepted.

    logprobs: of each token, if asked.  prompt_logprobs: of this piece, if asked.  error: why the request ends after these tokens.
    """

    request_id: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """What one executed batch brought, in the batch's order. decoded: the token of each of its `decodes`, which `drawn` then lacks; below 0 for one
    that is in `drawn` after all.  None: `drawn` has all sequences."""

    drawn: Sequence[DrawnTokens] = field(default_factory=tuple)
    decoded: Sequence[int] | None = None
