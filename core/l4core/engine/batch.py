"""What passes between the rooms of a step: scheduler → runner (`ScheduledBatch`), runner → model (`ForwardBatch`), model → scheduler (`StepTokens`).

Frozen records. The scheduler's side holds plain integers; the model's side holds device tensors. Those made once per sequence and step are
msgspec structs: creating one takes a fourteenth of the time of a frozen dataclass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from l4core.request import Request, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPages:
    """Block-table entries to write before this step: pages[i] is the page of page index `first_index + i` (index = position // page_size)."""

    first_index: int
    pages: Sequence[int]


class ScheduledSequence(msgspec.Struct, frozen=True, kw_only=True):
    """One request's part of a step: tokens [start, start + len(token_ids)) are computed; their KV slots are already reserved.

    row: the request's row in the persistent block tables, its own from admission to end or preemption.  new_pages: KV group name → entries
    that changed since the request was last scheduled.  draws: the last token's logits give a new token (False while the prompt is unfinished).
    output_token_ids: all drawn so far, as a view of the scheduler's own list: read it before `commit`, which appends to it.
    """

    request: Request
    row: int
    start: int
    token_ids: Sequence[int]
    new_pages: Mapping[str, NewPages]
    draws: bool
    is_decode: bool
    output_token_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledBatch:
    """Decodes first, then prefill pieces; a piece never crosses a chunk border. step: counts scheduled batches."""

    step: int
    sequences: Sequence[ScheduledSequence]

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.sequences)

    @property
    def num_decodes(self) -> int:
        return sum(s.is_decode for s in self.sequences)


class DrawnToken(msgspec.Struct, frozen=True, kw_only=True):
    """The token drawn for one scheduled sequence, None while its prompt is unfinished; prompt logprobs of this piece if asked."""

    request_id: str
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """What one executed batch brought, in the batch's order."""

    drawn: Sequence[DrawnToken] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inbox:
    """What came in since the last step. The scheduler reads no clock: deadlines arrive here as aborts.

    flush_cache: forget all cached prefixes, before the requests are taken in.
    """

    requests: Sequence[Request] = ()
    aborts: Sequence[str] = ()
    flush_cache: bool = False
