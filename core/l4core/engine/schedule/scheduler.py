"""Which tokens the next step computes, and what becomes of those it drew. Torch-free, deterministic, reads no clock.

Requests are served in rank order: higher priority first, then arrival. A request takes pages only from one of worse rank, so the best one is
never evicted. It may sit out while worse ones decode, but every decode leaves a token that is kept for good, so there are finitely many of
those; then it moves, ends, and leaves its place to the second: every admitted request ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from itertools import chain
from types import MappingProxyType

from l4core.engine.batch import NO_DRAFT, Draft, DraftRequest, NewPages, ScheduledBatch, ScheduledSequence, StepTokens
from l4core.engine.schedule.admission import SchedulerLimits, is_computed_now, refusal, take_prefix, victims_for
from l4core.engine.schedule.choice import NO_FLIGHT, Choice, Flight, last_token
from l4core.engine.schedule.outcomes import take_in, take_in_decoded
from l4core.engine.schedule.sequence import NO_ROW, RankedQueue, SequenceState
from l4core.engine.schedule.step_costs import StepBudget, StepCosts
from l4core.engine.schedule.step_counts import StepCounts
from l4core.engine.schedule.stops import StopRule
from l4core.errors import RequestError
from l4core.kv.manager import NOTHING, KVManager, NewEntries
from l4core.request import FinishReason, Request, SequenceUpdate, StepOutput, StepStats

__all__ = ["Scheduler", "SchedulerLimits"]

NO_PAGES: Mapping[str, NewPages] = MappingProxyType({})
NO_DRAFTS: Mapping[str, Draft] = MappingProxyType({})
LOOKS_PER_STEP = 256
"""Pages of its prefix that a request may look at for each step that it waits for memory: one of ten million tokens has 156,250."""


class Scheduler:
    """add/abort as messages come, then schedule → (execute) → commit, once a step. `commit` also ends a step that had nothing to execute.

    With max_in_flight 2 a batch may be scheduled before the one before it is committed. Its decodes then have tokens that the host does not know; a
    sequence that turns out to have ended computes one token too many, which nobody sees: its pages may be another's by then, but only for a
    batch that the device computes later.
    """

    def __init__(self, limits: SchedulerLimits, kv: KVManager, *, max_in_flight: int = 1) -> None:
        if limits.chunk_size != kv.chunk_size:
            raise ValueError(f"the limits say chunks of {limits.chunk_size} tokens, the KV groups {kv.chunk_size}")
        self.limits = limits
        self.kv = kv
        self.costs: StepCosts | None = None
        self._waiting, self._running = RankedQueue(), RankedQueue()
        self._live: dict[str, SequenceState] = {}
        self._rows = list(range(limits.max_running - 1, -1, -1))
        self.max_in_flight = max_in_flight
        self._flights: deque[Flight] = deque()
        self._updates: list[SequenceUpdate] = []
        self._evicted: list[SequenceState] = []
        self._num_arrived = self._step = 0
        self._counts = StepCounts(group.name for group in kv.groups)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute or report anything."""
        return bool(self._live or self._updates or self._flights)

    def add(self, request: Request) -> None:
        """Queue a request; one that could never finish is answered by an ERROR update at the next commit. RequestError: its id is in use."""
        if request.request_id in self._live:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        stops = StopRule.of(request)
        error = refusal(request, stops, self.limits, self.kv)
        if error:
            self._report_end(request, FinishReason.ERROR, error)
            return
        self._num_arrived += 1
        prompt_len = len(request.prompt_token_ids)
        seq = SequenceState(
            request=request,
            rank=(-request.priority, self._num_arrived),
            stops=stops,
            tables=self.kv.new_tables(),
            prompt_len=prompt_len,
            num_tokens=prompt_len,
        )
        seq.hash_pages(request.cache_salt, self.kv.page_size, self.kv.num_ahead)
        self._live[request.request_id] = seq
        self._waiting.add(seq)

    def abort(self, request_id: str) -> None:
        """Forget the request and free its pages now, wherever it is; an ABORT update follows. Unknown (or ended) ids are no error."""
        seq = self._live.get(request_id)
        if seq is not None:
            self._end(seq)
            self._report_end(seq.request, FinishReason.ABORT)

    def draftable(self, max_drafts: int, num_slots: int = 0) -> list[DraftRequest]:
        """Decoding sequences that have slots for drafts, best first; slots that are free are taken for them, nobody is evicted.
        num_slots: that a drafter needs while it guesses, if more than the draft itself takes.

        Slots stay the sequence's when the draft is refused: its own tokens come to lie there.
        """
        found: list[DraftRequest] = []
        for seq in self._running:
            count = min(max_drafts, seq.last_slot - seq.num_tokens)
            if not seq.is_decode or count < 1 or seq.first_guess < self.limits.draft_floor:
                continue
            room = min(max(count, num_slots), seq.last_slot - seq.num_tokens)
            new = self.kv.reserve(seq.tables, seq.num_tokens + room, leave=len(self._running))
            if new is None:
                continue
            found.append(
                DraftRequest(
                    request=seq.request,
                    row=seq.row,
                    num_tokens=seq.num_tokens,
                    output_token_ids=seq.output_token_ids,
                    max_drafts=count,
                    new_pages=_entries(new),
                    room=room,
                )
            )
        return found

    def schedule(self, drafts: Mapping[str, Draft] = NO_DRAFTS) -> ScheduledBatch | None:
        """The next step's work with its KV slots reserved, or None when there is none. drafts: request id → what to verify of a sequence that
        `draftable` named since the last commit. Raises RuntimeError while max_in_flight batches wait for their commit."""
        if len(self._flights) >= self.max_in_flight:
            raise RuntimeError("schedule() was called before the batch in flight was committed")
        choice = Choice()
        prefills = self._split(choice)
        budget = self._schedule_decodes(choice, drafts)
        self._schedule_prefills(prefills, choice, budget)
        flight = choice.launch(self._step + 1, is_alone=not self._flights)
        if flight is None:
            return None
        self._flights.append(flight)
        self._step += 1
        return flight.batch

    def commit(self, tokens: StepTokens | None) -> StepOutput:
        """Take in what the oldest batch in flight drew → updates of all requests it changed, and the gauges. None: no batch has been waited for.

        Raises ValueError when `tokens` are not those of that batch.
        """
        flight = self._flights[0] if self._flights and tokens is not None else NO_FLIGHT
        decoded, others = flight.divide(tokens or StepTokens())
        updates, self._updates = self._updates, []
        updates += take_in_decoded(decoded, self.kv, self._end)
        for (seq, entry), drawn in others:
            if not seq.finished and (update := take_in(seq, entry, drawn, self.kv, self._counts)) is not None:
                updates.append(update)
                if update.finish_reason is not None:
                    self._end(seq)
        if flight is not NO_FLIGHT:
            self._counts.computed(flight.batch)
            self._flights.popleft()
        return StepOutput(updates=updates, stats=self._stats())

    @property
    def sequences(self) -> Collection[SequenceState]:
        """All requests that have not ended, in order of arrival. To look at, not to change."""
        return self._live.values()

    def holds(self, entry: ScheduledSequence) -> bool:
        """Whether the sequence still has the block-table row that it was scheduled with: it has neither ended nor been evicted since."""
        seq = self._live.get(entry.request.request_id)
        return seq is not None and seq.row == entry.row

    def check_integrity(self) -> None:
        """Compare queues, rows and pages with each other; O(pages). Raises RuntimeError naming what does not agree."""
        self.kv.check_integrity(seq.tables for seq in self.sequences)
        rows = [seq.row for seq in self._running]
        if sorted((*rows, *self._rows)) != list(range(self.limits.max_running)):
            raise RuntimeError(
                f"block-table rows {sorted(rows)} are in use and {sorted(self._rows)} free, of {self.limits.max_running}"
            )
        if any(seq.row != NO_ROW or seq.num_computed for seq in self._waiting):
            raise RuntimeError("a waiting sequence has a row or computed tokens")
        if {id(seq) for seq in (*self._running, *self._waiting)} != {id(seq) for seq in self.sequences}:
            raise RuntimeError("the queues and the list of live requests differ")

    def abandon(self) -> None:
        """What is in flight will never be committed (its execution failed or was interrupted): its sequences start over from the queue.

        Their pages are given back, since the tables written for them may be incomplete and the KV half written.
        """
        while self._flights:
            for seq, entry in self._flights.pop().parts:
                seq.settle(entry)
                if not seq.finished and seq.row != NO_ROW:
                    self._preempt(seq)

    # --- one step's choice -------------------------------------------------------------------------------------------------------------

    def _split(self, choice: Choice) -> list[SequenceState]:
        """Running sequences that have only their last token left to compute go into the choice; → the others; each best first. One that has drawn all
        it may, known or in flight, is in neither: the last token that is allowed is seen coming, an end by its id is not."""
        prefills: list[SequenceState] = []
        for seq in self._running:
            if not seq.is_decode:
                prefills.append(seq)
            elif seq.num_tokens < seq.last_tokens:
                choice.decodes.append(seq)
        return prefills

    def _schedule_decodes(self, choice: Choice, drafts: Mapping[str, Draft]) -> StepBudget:
        """Leaves out decodes for which there is no slot, and gives drafts to the others → what prompts may still take.

        There are never more decodes than a step has tokens: the youngest was admitted in a step that served all the others too. Drafts get what
        is left.
        """
        room = self.limits.max_tokens_per_step - len(choice.decodes)
        wanting = [seq for seq in choice.decodes if seq.num_tokens > seq.tables.capacity]
        for seq in wanting:
            new_pages = None if seq.row == NO_ROW else self._make_room(seq, seq.num_tokens)  # evicted by a better one
            if new_pages is not None:
                choice.new_pages[seq.row] = new_pages
        if wanting:
            choice.decodes = [s for s in choice.decodes if s.row != NO_ROW and s.num_tokens <= s.tables.capacity]
        num_decodes = len(choice.decodes)
        num_guesses = self._add_guesses(choice, drafts, room) if drafts else 0
        return StepBudget(self.limits.max_tokens_per_step - num_decodes - num_guesses, self.costs, num_decodes)

    def _add_guesses(self, choice: Choice, drafts: Mapping[str, Draft], room: int) -> int:
        """Decodes that have a draft, and slots for some of it, become drafts → guesses taken, `room` at most."""
        plain: list[SequenceState] = []
        left = room
        for seq in choice.decodes:
            draft = drafts.get(seq.request_id, NO_DRAFT)
            most = min(left, min(seq.tables.capacity, seq.last_slot) - seq.num_tokens)
            guesses = draft.token_ids[: max(0, most)]
            if not guesses:
                plain.append(seq)
                continue
            left -= len(guesses)
            entry = ScheduledSequence(
                request=seq.request,
                row=seq.row,
                start=seq.num_tokens - 1,
                token_ids=(last_token(seq), *guesses),
                new_pages=choice.new_pages.get(seq.row, NO_PAGES),
                draws=True,
                is_decode=True,
                output_token_ids=seq.output_token_ids,
                num_drafts=len(guesses),
                parents=draft.parents[: len(guesses)],
            )
            choice.drafts.append((seq, entry))
        choice.decodes = plain
        return room - left

    def _schedule_prefills(self, prefills: list[SequenceState], choice: Choice, budget: StepBudget) -> None:
        """The next piece of every prompt, running or waiting, best first, until tokens or pages run out."""
        for seq in prefills:
            self._admit(choice, budget, before=seq)
            if seq.row == NO_ROW:
                continue
            if not (
                budget and self._schedule_piece(seq, choice, budget)
            ):  # worse ones must not take the pages it waits for
                return
        self._admit(choice, budget)

    def _must_wait(self, seq: SequenceState, choice: Choice) -> bool:
        """Told without looking at every page of its prefix: it found no memory a short while ago, or finds more of its prefix a step later."""
        if self._step < seq.look_again and len(self._running) > 0:
            return True
        return is_computed_now(seq, chain(choice.pieces, *(flight.others for flight in self._flights)), self.kv)

    def _count_hits(self, seq: SequenceState) -> None:
        """For the gauges, and for the request's own usage the first time it starts."""
        start = seq.num_prefilled
        if seq.num_cached is None:
            seq.num_cached = min(start, seq.prompt_len)
        for group, table in zip(self.kv.groups, seq.tables.tables, strict=True):
            self._counts.hit(group.name, max(0, start - table.first_index * self.kv.page_size))

    def _schedule_piece(self, seq: SequenceState, choice: Choice, budget: StepBudget, *, first: bool = False) -> bool:
        """A piece that the budget allows and that ends at a chunk border at the latest → whether there were pages for it.

        first: since it has a row, so the row's entries are all new, those of a cached prefix among them.
        """
        start, border = seq.num_prefilled, seq.num_tokens
        if self.limits.chunk_size is not None:
            border = min(border, (start // self.limits.chunk_size + 1) * self.limits.chunk_size)
        end = start + budget.piece(start, border, self.kv.page_size)
        new_pages = self._make_room(seq, end, choice)
        if new_pages is None:
            return False
        budget.spend(start, end - start)
        if first and start:
            new_pages = {
                group.name: NewPages(first_index=table.first_index, pages=tuple(table.pages))
                for group, table in zip(self.kv.groups, seq.tables.tables, strict=True)
            }
        entry = ScheduledSequence(
            request=seq.request,
            row=seq.row,
            start=start,
            token_ids=seq.token_ids(start, end),
            new_pages=new_pages,
            draws=end == seq.num_tokens,
            is_decode=False,
            output_token_ids=seq.output_token_ids,
        )
        choice.pieces.append((seq, entry))
        return True

    def _admit(self, choice: Choice, budget: StepBudget, before: SequenceState | None = None) -> None:
        """Start waiting requests (those that rank before `before`) while the budget, rows and pages last.

        Strictly in rank order: a small one does not overtake a large one that waits for memory, or the large one might wait for ever.
        """
        while budget and self._waiting:
            seq = self._waiting.first
            if seq in self._evicted or (before is not None and seq.rank > before.rank):
                break
            if self._must_wait(seq, choice):
                break
            take_prefix(seq, self.kv)
            victims = victims_for(seq, self._running, self.limits, self.kv)
            if victims is None:
                seq.look_again = self._step + seq.num_prefilled // self.kv.page_size // LOOKS_PER_STEP
                self.kv.release(seq.tables)
                seq.start_over()
                break
            for victim in victims:
                self._preempt(victim)
            self._waiting.remove(seq)
            seq.row = self._rows.pop()
            self._running.add(seq)
            started = self._schedule_piece(seq, choice, budget, first=True)
            assert started, "admission left no room for the first piece"
            self._count_hits(seq)

    def _make_room(
        self, seq: SequenceState, upto_len: int, choice: Choice | None = None
    ) -> Mapping[str, NewPages] | None:
        """Slots for the first `upto_len` tokens, taken from worse-ranked sequences if need be; None = it must sit this step out.

        Sitting out keeps its pages: it is evicted only when a better one needs them. A decode already in this step's choice is left alone, for
        it will end and give its pages back without any work lost, unless its priority is lower.
        """
        while (new := self.kv.reserve(seq.tables, upto_len)) is None:
            victim = self._running.last
            is_peer = victim.request.priority == seq.request.priority
            if victim is seq or (is_peer and choice is not None and choice.holds(victim)):
                return None
            self._preempt(victim)
        return _entries(new)

    # --- what becomes of a sequence ----------------------------------------------------------------------------------------------------

    def _preempt(self, seq: SequenceState) -> None:
        """Back to its place in the queue. It keeps its output; prompt and output are computed again, and its next token is the same."""
        self._leave_row(seq)
        seq.start_over()
        self._waiting.add(seq)
        self._evicted.append(seq)

    def _end(self, seq: SequenceState) -> None:
        if seq.row == NO_ROW:
            self._waiting.remove(seq)
        else:
            self._leave_row(seq)
        seq.finished = True
        del self._live[seq.request.request_id]

    def _leave_row(self, seq: SequenceState) -> None:
        self._running.remove(seq)
        self.kv.release(seq.tables)
        self._rows.append(seq.row)
        seq.row = NO_ROW

    def _report_end(self, request: Request, reason: FinishReason, error: str = "") -> None:
        self._updates.append(SequenceUpdate(request_id=request.request_id, finish_reason=reason, error=error))

    def _stats(self) -> StepStats:
        """What was counted since the last call, and gauges after the step."""
        evicted, self._evicted = self._evicted, []
        counts, self._counts = self._counts, StepCounts(group.name for group in self.kv.groups)
        return counts.stats(
            num_running=len(self._running), num_waiting=len(self._waiting), num_preemptions=len(evicted), kv=self.kv
        )


def _entries(new: NewEntries) -> Mapping[str, NewPages]:
    if new is NOTHING:
        return NO_PAGES
    return {name: NewPages(first_index=first, pages=pages) for name, (first, pages) in new.items()}
