"""A request's state while the engine works on it, and the order in which requests are served. Torch-free."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from l4core.engine.batch import ScheduledSequence
from l4core.engine.schedule.stops import StopRule
from l4core.kv.prefix import PageHashes
from l4core.kv.tables import PageTables
from l4core.request import FinishReason, Request, TokenLogprobs

NO_ROW = -1
_rank = attrgetter("rank")


@dataclass(slots=True, kw_only=True, eq=False)
class SequenceState:
    """Owned by the scheduler, from `add` to the end. Token i of the sequence is prompt[i], then output_token_ids[i − prompt_len].

    rank: (−priority, arrival number), smaller is served first.  num_tokens: prompt + output, with those that batches in flight draw and that
    output_token_ids lacks.  last_tokens: num_tokens at which it has drawn all it may.  num_prefilled: tokens whose KV is in the pages once those
    batches are done, until it decodes.  row: block-table row, NO_ROW while waiting.  is_decode: only the token drawn last is left to compute.
    due: output tokens at which more is to be done than to note the token (a page is full, the answer is over); 0 = see at the next.
    hashes: of its full pages.  num_cached: prompt tokens found computed when it first started, None before.
    first_guess: share of drafts whose first guess was right, lately.
    num_prompt_logprobs: prompt positions whose logprobs were handed out.  look_again: step before which it need not look for memory.
    """

    request: Request
    rank: tuple[int, int]
    stops: StopRule
    tables: PageTables
    prompt_len: int
    num_tokens: int
    num_prefilled: int = 0
    row: int = NO_ROW
    is_decode: bool = False
    output_token_ids: list[int] = field(default_factory=list)
    due: int = 0
    finished: bool = False
    num_prompt_logprobs: int = 0
    hashes: PageHashes = field(init=False)
    num_cached: int | None = None
    first_guess: float = 0.5
    look_again: int = 0
    request_id: str = field(init=False)
    last_tokens: int = field(init=False)
    end_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        """What every step asks for lies beside the rest."""
        self.request_id, self.end_ids = self.request.request_id, self.stops.end_ids
        self.last_tokens = self.prompt_len + self.stops.max_output

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is in the pages once the batches in flight are done."""
        return self.num_tokens - 1 if self.is_decode else self.num_prefilled

    @property
    def num_pending(self) -> int:
        """Tokens that batches in flight draw."""
        return self.num_tokens - self.prompt_len - len(self.output_token_ids)

    def hash_pages(self, salt: str, page_size: int, num_ahead: int = 0) -> None:
        """Start the chain of hashes of its own tokens."""
        self.hashes = PageHashes(salt, page_size, self.token_ids, num_ahead=num_ahead)

    @property
    def num_hashable(self) -> int:
        """Tokens whose pages have hashes: what comes after them is known as far as those depend on it."""
        return self.prompt_len + len(self.output_token_ids) - self.hashes.num_ahead

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions are still to be computed for their logprobs, so that no cached page may stand in for them."""
        return self.request.params.prompt_logprobs is not None and self.num_prompt_logprobs < self.prompt_len

    @property
    def last_slot(self) -> int:
        """Slots it can ever need: nothing is computed after the last output token."""
        return self.last_tokens - 1

    def token_ids(self, begin: int, end: int) -> Sequence[int]:
        """Tokens [begin, end) of the sequence; O(end − begin)."""
        prompt, split = self.request.prompt_token_ids, self.prompt_len
        if end <= split:
            return prompt[begin:end]
        outputs = self.output_token_ids[max(0, begin - split) : end - split]
        return outputs if begin >= split else [*prompt[begin:], *outputs]

    def advance(self, entry: ScheduledSequence) -> None:
        """The entry is in a batch that will be computed: from now on its tokens count as computed, and a token it draws as drawn. Of a draft only
        the token before it is sure."""
        if not entry.is_decode:
            self.num_prefilled = entry.start + len(entry.token_ids)
            self.is_decode = entry.draws
        self.num_tokens += entry.draws

    def settle(self, entry: ScheduledSequence) -> None:
        """The other way: what the entry drew is about to be taken in, or never will be."""
        self.num_tokens -= entry.draws

    def start_over(self) -> None:
        """Its pages are gone: all its tokens are to be computed again."""
        self.num_prefilled, self.is_decode, self.due = 0, False, 0

    def judge_draft(self, is_right: bool) -> None:
        """Note whether the first guess of a draft was right. What came longer ago counts less: half after 34 drafts."""
        self.first_guess += 0.02 * (is_right - self.first_guess)

    def extend(self, token_ids: Sequence[int]) -> tuple[Sequence[int], FinishReason | None]:
        """Take in tokens up to the one that ends the sequence → those taken in, and why it ends."""
        if len(token_ids) == 1:
            return token_ids, self.append(token_ids[0])
        for count, token_id in enumerate(token_ids, start=1):
            reason = self.append(token_id)
            if reason is not None:
                return token_ids[:count], reason
        return token_ids, None

    def append(self, token_id: int) -> FinishReason | None:
        """Take in the drawn token → why the sequence ends with it, None = it goes on."""
        self.output_token_ids.append(token_id)
        self.num_tokens += 1
        return self.end_by(token_id)

    def end_by(self, token_id: int) -> FinishReason | None:
        """Why the sequence ends with this token, its last; None = it goes on."""
        stops, num_output = self.stops, len(self.output_token_ids)
        if token_id in stops.end_ids and num_output > stops.min_output:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_output >= stops.max_output else None

    def new_prompt_logprobs(
        self, start: int, entries: Sequence[TokenLogprobs | None]
    ) -> Sequence[TokenLogprobs | None]:
        """Those of a piece's entries that were not handed out yet; marks them handed out.

        A piece that starts at token `start` brings positions start + 1, …, and position 0 (None: no predecessor) too if it is the first. After
        a preemption the prompt is computed again, perhaps cut elsewhere.
        """
        first = start + 1 if start else 0
        known, end = self.num_prompt_logprobs, min(first + len(entries), self.prompt_len)
        if first > known:
            raise ValueError(f"{self.request.request_id}: prompt logprobs came from position {first}; wanted {known}")
        self.num_prompt_logprobs = max(known, end)
        return entries[known - first : end - first]


class RankedQueue:
    """Sequences in rank order, best first. Adding and removing take O(log n) comparisons."""

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items: list[SequenceState] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[SequenceState]:
        return iter(self._items)

    def __reversed__(self) -> Iterator[SequenceState]:
        return reversed(self._items)

    @property
    def first(self) -> SequenceState:
        """The best; IndexError when empty."""
        return self._items[0]

    @property
    def last(self) -> SequenceState:
        """The worst: lowest priority, and the youngest of those. IndexError when empty."""
        return self._items[-1]

    def add(self, seq: SequenceState) -> None:
        """Put it at its place."""
        insort(self._items, seq, key=_rank)

    def remove(self, seq: SequenceState) -> None:
        """Take it out; it must be in."""
        index = bisect_left(self._items, seq.rank, key=_rank)
        assert self._items[index] is seq
        del self._items[index]
