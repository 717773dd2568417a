"""Any order of arrivals, steps and aborts over pools so small that requests evict each other: the words stay those of each request alone."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import event, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from l4core.engine.batch import PENDING, ScheduledBatch
from l4core.engine.schedule.sequence import NO_ROW, SequenceState
from l4core.kv.blocks import KVGroup
from l4core.kv.planner import Footprint
from l4core.kv.superpages import superpage_shape
from l4core.request import FinishReason, Request, SamplingParams, SequenceUpdate, StepOutput
from l4core.testing.simulation import SimulatedEngine, output_alone

VOCAB, EOS, STOP = 32, 0, 1
MAX_CONTEXT = 32
LONG = 1800
"""Seconds before the full counts are taken for a hang."""
PATIENCE = 5000
"""Steps after which a request that has not ended never will: the largest case here needs some hundreds."""


def groups_of(kind: str, chunk: int, *, hybrid: bool = True) -> list[KVGroup]:
    full = KVGroup(name="global", layer_ids=(3,), chunk_size=None)
    local = KVGroup(name="local", layer_ids=(0, 1, 2), chunk_size=chunk, keep_all=not hybrid)
    return {"both": [full, local], "global": [full], "local": [local]}[kind]


@st.composite
def engines(draw: st.DrawFn) -> SimulatedEngine:
    page_size = draw(st.sampled_from([1, 2, 4]))
    chunk = page_size * draw(st.sampled_from([1, 2, 4]))
    overlapped = draw(st.booleans())
    kind, hybrid = draw(st.sampled_from(["both", "both", "both", "global", "local"])), draw(st.integers(0, 4)) > 0
    groups = groups_of(kind, chunk, hybrid=hybrid)
    footprint = Footprint(groups=groups, shape=superpage_shape(groups), page_size=page_size)
    return SimulatedEngine(
        groups,
        page_size=page_size,
        num_superpages=1 + footprint.superpages(20) + draw(st.integers(0, 6)),
        prefix_cache=draw(st.sampled_from([True, True, True, False])),
        max_local=draw(st.sampled_from([None, None, chunk // page_size + 1])) if hybrid else None,
        max_running=draw(st.sampled_from([1, 2, 4, 6])),
        max_tokens_per_step=draw(st.integers(1, 16)),
        max_context=MAX_CONTEXT,
        vocab_size=VOCAB,
        num_drafts=0 if overlapped else min(chunk - 1, draw(st.sampled_from([0, 0, 1, 3]))),
        overlapped=overlapped,
        as_columns=draw(st.booleans()),
    )


@st.composite
def requests(draw: st.DrawFn, request_id: str) -> Request:
    own = [byte % VOCAB for byte in draw(st.binary(min_size=1, max_size=10))]
    prompt = [*range(2, 2 + draw(st.sampled_from([0, 0, 4, 8, 12]))), *own]  # often a beginning that others have too
    max_tokens = draw(st.integers(0, 20)) or None
    eos, stop = draw(st.sampled_from([((), ()), ((EOS,), ()), ((EOS,), (STOP,)), ((), (STOP,))]))
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(draw(st.sampled_from([0, 0, 5])), max_tokens or 5),
        stop_token_ids=stop,
        prompt_logprobs=draw(st.sampled_from([None, None, 0])),
        seed=0,
    )
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=params,
        eos_token_ids=eos,
        max_total_tokens=min(MAX_CONTEXT, len(prompt) + draw(st.integers(1, MAX_CONTEXT))),
        priority=draw(st.sampled_from([0, 0, 0, 1, 2])),
        cache_salt=draw(st.sampled_from(["", "", "another tenant"])),
    )


class Answer:
    """What a client has received."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.prompt_positions: list[int] = []
        self.last: SequenceUpdate | None = None

    def take(self, update: SequenceUpdate) -> None:
        assert self.last is None or self.last.finish_reason is None, "an update came after the end"
        self.last = update
        self.token_ids += update.new_token_ids
        self.prompt_positions += [0 if entry is None else round(-entry.logprob) for entry in update.prompt_logprobs]


def check_answer(engine: SimulatedEngine, answer: Answer) -> None:
    """The answer is the one that the request gets alone, whole if it ended by itself and its beginning otherwise."""
    request, last = answer.request, answer.last
    assert last is not None
    assert last.finish_reason is not None, f"{request.request_id} never ended"
    if last.finish_reason is FinishReason.ERROR:
        assert "tokens" in last.error
        assert not answer.token_ids
        return
    expected = output_alone(engine.groups, request, VOCAB)
    if last.finish_reason is FinishReason.ABORT:
        assert answer.token_ids == expected[: len(answer.token_ids)]
        return
    assert answer.token_ids == expected
    ends = {*request.eos_token_ids, *request.params.stop_token_ids}
    assert (last.finish_reason is FinishReason.STOP) == (
        expected[-1] in ends and len(expected) > request.params.min_tokens
    )
    assert last.stop_token_id == (expected[-1] if last.finish_reason is FinishReason.STOP else None)
    asked = request.params.prompt_logprobs is not None
    assert answer.prompt_positions == (list(range(len(request.prompt_token_ids))) if asked else [])


def check_batch(engine: SimulatedEngine, batch: ScheduledBatch) -> None:
    limits, sequences = engine.scheduler.limits, batch.sequences
    assert 0 < batch.num_tokens <= limits.max_tokens_per_step
    assert [s.is_decode for s in sequences] == sorted((s.is_decode for s in sequences), reverse=True), (
        "decodes come first"
    )
    assert max(Counter(s.row for s in sequences).values()) == 1
    assert all(0 <= s.row < limits.max_running for s in sequences)
    for seq in sequences:
        known = [*seq.request.prompt_token_ids, *seq.output_token_ids]
        end = seq.start + len(seq.token_ids) - seq.num_drafts
        pending = seq.token_ids[0] == PENDING
        assert list(seq.token_ids[: end - seq.start]) == ([PENDING] if pending else known[seq.start : end])
        assert not seq.num_drafts or seq.is_decode
        assert not pending or engine.overlapped
        assert seq.draws == (end == len(known) + pending)
        if limits.chunk_size is not None:
            assert seq.start // limits.chunk_size == (end - 1) // limits.chunk_size


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, Answer] = {}

    @initialize(engine=engines())
    def build(self, engine: SimulatedEngine) -> None:
        self.engine, self.scheduler = engine, engine.scheduler

    @rule(data=st.data(), count=st.integers(1, 3))
    def add(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            request = data.draw(requests(f"r{len(self.answers)}"))
            self.answers[request.request_id] = Answer(request)
            self.scheduler.add(request)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.abort(data.draw(st.sampled_from([*self.answers, "nobody"])))

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @rule(data=st.data())
    def abort_in_flight(self, data: st.DataObject) -> None:
        self.step(data.draw(st.sampled_from([*self.answers, "nobody"])))

    def step(self, abort: str | None = None) -> None:
        first = min(self.scheduler.sequences, key=lambda s: s.rank, default=None)
        before = None if first is None else (first.row, first.num_computed)
        batch = self.scheduler.schedule(self.engine.propose())
        assert batch is not None or first is None or self.engine.overlapped, "there is work, and the step has none"
        tokens = None
        if batch is not None:
            check_batch(self.engine, batch)
            tokens = self.engine.execute(batch)
        if first is not None and before is not None:
            self.check_first(first, *before, batch)
        if abort is not None:
            self.scheduler.abort(abort)
        self.deliver(self.scheduler.commit(self.engine.turn(tokens)))

    def check_first(self, first: SequenceState, row: int, num_computed: int, batch: ScheduledBatch | None) -> None:
        """The best request of all lost nothing, and is served unless decodes and their guesses took all the tokens or the last pages."""
        entries = {} if batch is None else {s.request.request_id: s for s in batch.sequences}
        own = entries.get(first.request_id)
        if row != NO_ROW:
            start = first.num_computed if own is None else own.start
            assert (first.row, start) == (row, num_computed), "the best request was evicted"
        if self.engine.overlapped:
            return  # it may wait for tokens or pages that a batch in flight brings
        decodes = [s for s in entries.values() if s.is_decode]
        if own is None and len(decodes) < len(entries):
            return  # it may wait for a page of its own beginning that another computes in this very step
        if sum(len(s.token_ids) for s in decodes) < self.scheduler.limits.max_tokens_per_step:  # guesses among them
            assert first.row != NO_ROW, "the best request waits while there are tokens for it"
            assert own is not None or decodes, "the best request does not move"
            assert own is not None or all(s.request.priority >= first.request.priority for s in decodes)

    def deliver(self, output: StepOutput) -> None:
        for update in output.updates:
            self.answers[update.request_id].take(update)
        if output.stats.num_preemptions:
            event("a request was preempted")
        assert output.stats.num_drafted_tokens == sum(update.num_drafted for update in output.updates)
        if output.stats.num_accepted_tokens:
            event("a guess was accepted")

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.scheduler.check_integrity()
        chunk, page = self.scheduler.limits.chunk_size, self.scheduler.kv.page_size
        for seq in self.scheduler.sequences:
            for group, table in zip(self.engine.groups, seq.tables.tables, strict=True):
                guessed = self.engine.num_drafts + 1 if self.engine.num_drafts else 0
                if self.engine.overlapped:
                    continue
                assert len(table.pages) <= -(-(seq.num_computed + guessed) // page)
                if group.lifetime is not None and chunk is not None:
                    assert table.first_index == seq.num_computed // chunk * chunk // page
                    most = -(-(seq.num_computed % chunk + guessed) // page)
                    assert -(-(seq.num_computed % chunk) // page) <= len(table.pages) <= most, (
                        "pages of a finished chunk are held"
                    )

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(PATIENCE):
            if not self.scheduler.has_work:
                break
            self.step()
        for answer in self.answers.values():
            check_answer(self.engine, answer)
        assert not any(self.scheduler.kv.pages_used.values()), "pages leaked"
        self.scheduler.kv.flush()
        assert not any(self.scheduler.kv.pages_cached.values()), "a flushed cache still holds pages"
        self.scheduler.check_integrity()


TestScheduler = pytest.mark.timeout(LONG)(SchedulerMachine.TestCase)
TestScheduler.settings = settings(stateful_step_count=30)


@pytest.mark.timeout(LONG)
@given(data=st.data(), chunk=st.sampled_from([1, 2, 4]), count=st.integers(3, 6))
def test_a_crowd_in_a_tiny_pool_gets_the_words_of_an_ample_one(data: st.DataObject, chunk: int, count: int) -> None:
    """Preempted or not, and whatever the pieces: same words. The tiny pool holds hardly more than one request."""
    groups = groups_of("both", chunk)
    crowd = [data.draw(requests(f"r{i}")) for i in range(count)]

    def run(num_superpages: int, max_tokens_per_step: int) -> tuple[dict[str, list[int]], int]:
        engine = SimulatedEngine(
            groups,
            page_size=1,
            num_superpages=num_superpages,
            max_running=count,
            max_tokens_per_step=max_tokens_per_step,
            max_context=MAX_CONTEXT,
            vocab_size=VOCAB,
        )
        words: dict[str, list[int]] = {request.request_id: [] for request in crowd}
        preemptions = 0
        for request in crowd:
            engine.scheduler.add(request)
        for _ in range(PATIENCE):
            if not engine.scheduler.has_work:
                break
            output = engine.step()
            preemptions += output.stats.num_preemptions
            for update in output.updates:
                words[update.request_id] += update.new_token_ids
        assert not engine.scheduler.has_work
        return words, preemptions

    footprint = Footprint(groups=groups, shape=superpage_shape(groups), page_size=1)
    tiny, preemptions = run(1 + footprint.superpages(MAX_CONTEXT), data.draw(st.integers(1, 12)))
    event(f"preemptions: {min(preemptions, 3)}")
    assert tiny == run(1000, 1000)[0]
