"""Decodes as columns are the same step as a list of records, and their tokens, taken in as such, do what draws one by one do."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import event, given

from l4core.engine.batch import Decodes, DecodesFirst, NewPages, ScheduledBatch, ScheduledSequence, StepTokens
from l4core.engine.process.turns import checksum
from l4core.kv.blocks import KVGroup
from l4core.kv.planner import Footprint
from l4core.kv.superpages import superpage_shape
from l4core.request import FinishReason, Request, SamplingParams, StepOutput
from l4core.testing.simulation import SimulatedEngine

GROUPS = (
    KVGroup(name="global", layer_ids=(3,), chunk_size=None),
    KVGroup(name="local", layer_ids=(0, 1, 2), chunk_size=4),
)
MAX_CONTEXT = 32


def engine(*, as_columns: bool, **options: int | bool) -> SimulatedEngine:
    """Pages of two tokens."""
    made = {"num_superpages": 60, "max_running": 8, "max_tokens_per_step": 24, **options}
    return SimulatedEngine(
        GROUPS,
        page_size=2,
        max_context=MAX_CONTEXT,
        vocab_size=32,
        as_columns=as_columns,
        **made,  # type: ignore[arg-type]
    )


def ask(name: str, prompt_len: int = 3, max_tokens: int | None = 6, *, priority: int = 0, **params: object) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(2, 2 + prompt_len)),
        params=SamplingParams(max_tokens=max_tokens, seed=0, **params),  # type: ignore[arg-type]
        eos_token_ids=(0,),
        max_total_tokens=MAX_CONTEXT,
        priority=priority,
    )


@st.composite
def crowds(draw: st.DrawFn) -> list[tuple[int, Request]]:
    """(step before which it comes, request)."""
    found = []
    for number in range(draw(st.integers(1, 10))):
        params = {
            "stop_token_ids": draw(st.sampled_from([(), (1,), tuple(range(8, 16))])),
            "min_tokens": draw(st.integers(0, 3)),
        }
        request = ask(
            f"r{number}",
            draw(st.integers(1, 12)),
            draw(st.integers(3, 18)),
            priority=draw(st.sampled_from([0, 0, 1])),
            **params,
        )
        found.append((draw(st.integers(0, 12)), request))
    return found


@given(
    crowd=crowds(),
    aborts=st.dictionaries(st.integers(0, 25), st.integers(0, 9), max_size=3),
    overlapped=st.booleans(),
    pool=st.integers(0, 8),
    prefix_cache=st.booleans(),
)
def test_tokens_as_columns_do_what_draws_one_by_one_do(
    crowd: list[tuple[int, Request]], aborts: dict[int, int], overlapped: bool, pool: int, prefix_cache: bool
) -> None:
    """Two schedulers are given the same; one takes in the tokens of decodes by the short way, the other draw by draw. Each step is the same."""
    least = Footprint(groups=GROUPS, shape=superpage_shape(GROUPS), page_size=2).superpages(MAX_CONTEXT)
    both = [
        engine(as_columns=way, overlapped=overlapped, num_superpages=1 + least + pool, prefix_cache=prefix_cache)
        for way in (True, False)
    ]
    ways = set()
    for step in range(400):
        seen = []
        for one in both:
            for _ in (r for at, r in crowd if at == step):
                one.scheduler.add(_)
            batch = one.scheduler.schedule()
            tokens = one.turn(None if batch is None else one.execute(batch))
            if step in aborts:
                one.scheduler.abort(f"r{aborts[step]}")
            output = one.scheduler.commit(tokens)
            one.scheduler.check_integrity()
            ways.add(tokens is not None and bool(tokens.decoded))
            states = [(s.row, s.num_tokens, s.num_computed, s.is_decode, s.finished) for s in one.scheduler.sequences]
            tables = [[t.pages for t in s.tables.tables] for s in one.scheduler.sequences]
            updates = [(u.request_id, list(u.new_token_ids), u.finish_reason, u.stop_token_id) for u in output.updates]
            sequences = None if batch is None else [*batch.sequences]
            seen.append((sequences, updates, output.stats, states, tables))
            if output.stats.num_preemptions:
                event("a request was preempted")
        assert seen[0] == seen[1]
        if step > 12 and not both[0].scheduler.has_work:
            break
    assert not both[0].scheduler.has_work
    assert ways == {True, False} or len(crowd) < 3


def test_a_decode_that_failed_or_has_logprobs_comes_beside_the_columns() -> None:
    made = engine(as_columns=True)
    for name in "abc":
        made.scheduler.add(ask(name, max_tokens=3, logprobs=0 if name == "b" else None))
    answers: dict[str, list[object]] = {name: [] for name in "abcd"}
    for step in range(20):
        if step == 3:
            made.scheduler.add(ask("d", prompt_len=9, max_tokens=3))  # its piece lies behind the decodes of a step
        for update in made.step().updates:
            assert len(update.logprobs) == (update.request_id == "b") * len(update.new_token_ids)
            answers[update.request_id] += [update.finish_reason] * len(update.new_token_ids)
    assert all(found == [None, None, FinishReason.LENGTH] for found in answers.values())


@pytest.mark.parametrize("pool", range(6, 30))
def test_a_newcomer_leaves_a_page_to_each_that_decodes(pool: int) -> None:
    made = engine(as_columns=True, num_superpages=1 + pool, prefix_cache=False)
    kv = made.scheduler.kv
    for name in "ab":
        made.scheduler.add(ask(name, prompt_len=1))
    made.step()
    needed = sum(kv.needed(kv.new_tables(), 0, 10 + kv.page_size))
    has_room = kv.num_available >= needed + 2
    made.scheduler.add(ask("c", prompt_len=10))
    batch = made.scheduler.schedule()
    assert batch is not None
    assert ("c" in [s.request.request_id for s in batch.sequences]) == has_room


def test_tokens_that_are_not_the_batchs_are_refused() -> None:
    made = engine(as_columns=True)
    for name in "ab":
        made.scheduler.add(ask(name, prompt_len=1))
    made.step()
    assert made.scheduler.schedule() is not None
    for tokens in (StepTokens(), *(StepTokens(decoded=ids) for ids in ([1], [-1], [1, 1, 1], [1, -1]))):
        with pytest.raises(ValueError, match=r"came for 2 scheduled sequences"):
            made.scheduler.commit(tokens)
    assert len(made.scheduler.commit(StepTokens(decoded=[5, 6])).updates) == 2


def batch() -> ScheduledBatch:
    """Three decodes, the second with new pages; a draft, a piece that draws and one that does not."""

    class State:
        def __init__(self, name: str) -> None:
            self.request, self.output_token_ids = ask(name), [7]

    pages = {"global": NewPages(first_index=4, pages=[9])}
    decodes = Decodes(
        rows=np.array([4, 0, 2]),
        starts=np.array([5, 8, 3]),
        token_ids=np.array([7, -1, 7]),
        new_pages={0: pages, 6: pages},
        states=[State(name) for name in "abc"],
    )
    others = [
        ScheduledSequence(
            request=ask(name),
            row=row,
            start=start,
            token_ids=ids,
            new_pages=new,
            draws=draws,
            is_decode=drafts > 0,
            num_drafts=drafts,
        )
        for name, row, start, ids, new, draws, drafts in [
            ("d", 1, 3, [5, 6, 7], {}, True, 2),
            ("e", 6, 0, [5, 6], pages, True, 0),
            ("f", 5, 2, [5, 6, 7, 8], {}, False, 0),
        ]
    ]
    return ScheduledBatch(step=3, sequences=DecodesFirst(decodes, others))


def test_columns_are_those_of_the_records() -> None:
    made = batch()
    as_list = ScheduledBatch(step=3, sequences=[*made.sequences])
    assert len(as_list.decodes.states) == 0
    for name in ("rows", "starts", "lengths", "num_draws", "token_ids", "borders"):
        assert list(getattr(made.columns, name)) == list(getattr(as_list.columns, name)), name
    assert [s.request.request_id for s in made.with_new_pages] == ["b", "e"]
    assert made.with_new_pages == as_list.with_new_pages
    assert (made.num_tokens, made.num_decodes, made.num_verified) == (12, 3, 1)
    assert (as_list.num_tokens, as_list.num_decodes, as_list.num_verified) == (12, 3, 1)
    assert checksum(made, StepOutput()) == checksum(as_list, StepOutput())


def test_records_are_found_as_in_a_list() -> None:
    sequences = batch().sequences
    as_list = [*sequences]
    assert len(sequences) == len(as_list) == 6
    assert [sequences[i] for i in range(-6, 6)] == [*as_list, *as_list]
    assert sequences[1:5:2] == as_list[1:5:2]
    for beyond in (6, -7):
        with pytest.raises(IndexError):
            sequences[beyond]
