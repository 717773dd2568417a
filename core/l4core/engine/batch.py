"""What passes between the rooms of a step: scheduler → runner (`ScheduledBatch`), runner → model (`ForwardBatch`), model → scheduler (`StepTokens`).

Frozen records. The scheduler's side holds plain integers; the model's side holds device tensors. Those made once per sequence and step are
msgspec structs: creating one takes a fourteenth of the time of a frozen dataclass, and the garbage collector need not look at it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from l4core.engine.step_costs import StepCosts
from l4core.request import Request, TokenLogprobs

PENDING = -1
"""In place of a token id: the token that the sequence drew last, which the host may not know yet and the device does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPages:
    """Block-table entries to write before this step: pages[i] is the page of page index `first_index + i` (index = position // page_size)."""

    first_index: int
    pages: Sequence[int]


class ScheduledSequence(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request's part of a step: tokens [start, start + len(token_ids)) are computed; their KV slots are already reserved.

    row: the request's row in the persistent block tables, its own from admission to end or preemption.  new_pages: KV group name → entries
    that changed since the request was last scheduled.  draws: the last token's logits give a new token (False while the prompt is unfinished).
    token_ids: [PENDING] for a decode after a batch that is still in flight.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledBatch:
    """Decodes first, then decodes with drafts, then prefill pieces; a piece never crosses a chunk border. step: counts scheduled batches."""

    step: int
    sequences: Sequence[ScheduledSequence]

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.sequences)

    @property
    def num_decodes(self) -> int:
        """Sequences of one row."""
        return sum(s.is_decode and not s.num_drafts for s in self.sequences)

    @property
    def num_verified(self) -> int:
        """Sequences with drafts."""
        return sum(s.num_drafts > 0 for s in self.sequences)


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
    """What one executed batch brought, in the batch's order."""

    drawn: Sequence[DrawnTokens] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inbox:
    """What came in since the last step. The scheduler reads no clock: deadlines arrive here as aborts.

    flush_cache: forget all cached prefixes, before the requests are taken in.  step_costs: what steps cost, and may cost, from now on; None = no
    change.  num_drafts: guesses wanted for each sequence from now on, None = no change.
    """

    requests: Sequence[Request] = ()
    aborts: Sequence[str] = ()
    flush_cache: bool = False
    step_costs: StepCosts | None = None
    num_drafts: int | None = None
