"""What one step takes, in small cases with known answers. The properties over all cases are in test_scheduler_properties.py."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import pytest

from l4core.engine.batch import Draft, DrawnTokens, ScheduledBatch, ScheduledSequence, StepTokens
from l4core.engine.scheduler import Scheduler, SchedulerLimits
from l4core.errors import RequestError
from l4core.kv.blocks import KVGroup
from l4core.kv.manager import KVManager
from l4core.request import FinishReason, Request, SamplingParams, SequenceUpdate, TokenLogprobs
from l4core.testing.simulation import SimulatedEngine

GROUPS = (
    KVGroup(name="global", layer_ids=tuple(range(1, 17)), chunk_size=None),
    KVGroup(name="local", layer_ids=(0,), chunk_size=8),
)
"""A superpage is one global page, or all local pages of a chunk: so a request takes one for each global page and one more."""


def engine(
    *,
    superpages: int = 200,
    max_running: int = 8,
    max_tokens_per_step: int = 64,
    max_context: int = 64,
    failing: Collection[str] = (),
    prefix_cache: bool = False,
) -> SimulatedEngine:
    """Pages of 2 tokens, chunks of 8. The prompts of most tests have one beginning, which is computed each time unless they ask otherwise."""
    return SimulatedEngine(
        GROUPS,
        page_size=2,
        num_superpages=superpages + 1,
        max_running=max_running,
        max_tokens_per_step=max_tokens_per_step,
        max_context=max_context,
        vocab_size=1000,
        failing=failing,
        prefix_cache=prefix_cache,
    )


def ask(
    request_id: str,
    prompt_len: int,
    max_tokens: int | None = 4,
    *,
    priority: int = 0,
    max_total_tokens: int = 64,
    eos: Sequence[int] = (),
    **params: object,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=list(range(prompt_len)),
        params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        eos_token_ids=eos,
        max_total_tokens=max_total_tokens,
        priority=priority,
    )


def pieces(batch: ScheduledBatch | None) -> list[tuple[str, int, int]]:
    """(request id, first token, end) of each part of a batch."""
    assert batch is not None
    return [(s.request.request_id, s.start, s.start + len(s.token_ids)) for s in batch.sequences]


def turns(made: SimulatedEngine) -> Iterator[int]:
    """Once for every step until all requests ended."""
    for turn in range(1000):
        if not made.scheduler.has_work:
            return
        yield turn
    raise AssertionError("1000 steps were not enough")


def steps(made: SimulatedEngine) -> list[list[tuple[str, int, int]]]:
    """Run to the end → what each step computed."""
    seen = []
    for _ in turns(made):
        batch = made.scheduler.schedule()
        if batch is not None:
            seen.append(pieces(batch))
        made.scheduler.commit(StepTokens() if batch is None else made.execute(batch))
    return seen


def run(made: SimulatedEngine) -> dict[str, list[SequenceUpdate]]:
    """Run to the end → updates of each request."""
    updates: dict[str, list[SequenceUpdate]] = {}
    for _ in turns(made):
        for update in made.step().updates:
            updates.setdefault(update.request_id, []).append(update)
    return updates


# --- what a step takes -----------------------------------------------------------------------------------------------------------------


def test_a_piece_ends_at_a_chunk_border_though_tokens_are_left() -> None:
    made = engine()
    made.scheduler.add(ask("a", 19, max_tokens=2))
    assert steps(made) == [[("a", 0, 8)], [("a", 8, 16)], [("a", 16, 19)], [("a", 19, 20)]]


def test_only_the_last_piece_draws() -> None:
    made = engine()
    made.scheduler.add(ask("a", 9))
    flags = []
    for _ in range(3):
        batch = made.scheduler.schedule()
        assert batch is not None
        flags.append((batch.sequences[0].draws, batch.sequences[0].is_decode, batch.step))
        made.scheduler.commit(made.execute(batch))
    assert flags == [(False, False, 1), (True, False, 2), (True, True, 3)]


def test_decodes_come_first_and_prefill_gets_what_they_leave() -> None:
    made = engine(max_tokens_per_step=6)
    for name in "ab":
        made.scheduler.add(ask(name, 2))
    made.step()
    made.scheduler.add(ask("c", 7))
    assert steps(made) == [
        [("a", 2, 3), ("b", 2, 3), ("c", 0, 4)],
        [("a", 3, 4), ("b", 3, 4), ("c", 4, 7)],
        [("a", 4, 5), ("b", 4, 5), ("c", 7, 8)],
        [("c", 8, 9)],
        [("c", 9, 10)],
    ]


def test_running_prompts_go_on_before_new_ones_start() -> None:
    made = engine(max_tokens_per_step=10)
    made.scheduler.add(ask("a", 14, max_tokens=1))
    made.scheduler.add(ask("b", 3, max_tokens=1))
    assert steps(made) == [[("a", 0, 8), ("b", 0, 2)], [("a", 8, 14), ("b", 2, 3)]]


def test_no_more_run_than_a_step_has_tokens_for() -> None:
    made = engine(max_tokens_per_step=2)
    made.scheduler.add(ask("a", 1, max_tokens=3))
    made.scheduler.add(ask("b", 1, max_tokens=3))
    made.scheduler.add(ask("c", 1, max_tokens=3))
    assert steps(made) == [
        [("a", 0, 1), ("b", 0, 1)],
        [("a", 1, 2), ("b", 1, 2)],
        [("a", 2, 3), ("b", 2, 3)],
        [("c", 0, 1)],
        [("c", 1, 2)],
        [("c", 2, 3)],
    ]


def test_no_more_run_than_there_are_rows_and_rows_are_used_again() -> None:
    made = engine(max_running=2)
    for name in "abc":
        made.scheduler.add(ask(name, 1, max_tokens=2))
    rows: dict[str, int] = {}
    for _ in turns(made):
        batch = made.scheduler.schedule()
        assert batch is not None
        rows.update({s.request.request_id: s.row for s in batch.sequences})
        made.scheduler.commit(made.execute(batch))
    assert rows["a"] != rows["b"]
    assert rows["c"] in (rows["a"], rows["b"])


def test_new_pages_carry_only_what_changed() -> None:
    made = engine()
    made.scheduler.add(ask("a", 7, max_tokens=4))
    seen = []
    for _ in turns(made):
        batch = made.scheduler.schedule()
        assert batch is not None
        seen.append({name: (new.first_index, list(new.pages)) for name, new in batch.sequences[0].new_pages.items()})
        made.scheduler.commit(made.execute(batch))
    assert seen == [
        {"global": (0, [1, 2, 3, 4]), "local": (0, [80, 81, 82, 83])},
        {},
        {
            "global": (4, [5]),
            "local": (4, [96]),
        },  # a new chunk: the global page takes the superpage that the old one gave back
        {},
    ]


# --- priorities, preemption, admission -------------------------------------------------------------------------------------------------


def test_higher_priority_starts_first_then_arrival_order() -> None:
    made = engine(max_running=1)
    for name, priority in (("a", 0), ("b", 1), ("c", 1), ("d", -1)):
        made.scheduler.add(ask(name, 1, max_tokens=1, priority=priority))
    assert [step[0][0] for step in steps(made)] == ["b", "c", "a", "d"]


def test_a_full_pool_evicts_the_youngest_and_its_words_stay_the_same() -> None:
    made = engine(superpages=10)
    made.scheduler.add(ask("a", 4, max_tokens=12))
    made.scheduler.add(ask("b", 4, max_tokens=8))
    seen, words, preemptions = [], dict[str, list[int]](a=[], b=[]), 0
    for _ in turns(made):
        batch = made.scheduler.schedule()
        seen.append(pieces(batch))
        assert batch is not None
        output = made.scheduler.commit(made.execute(batch))
        preemptions += output.stats.num_preemptions
        for update in output.updates:
            words[update.request_id] += update.new_token_ids
    assert preemptions == 1
    restart = next(step for step in seen[1:] if any(name == "b" and start == 0 for name, start, _ in step))
    assert restart == [("b", 0, 8)]  # 4 prompt tokens and those of its answer, once a has ended
    for name, max_tokens in (("a", 12), ("b", 8)):
        alone = engine()
        alone.scheduler.add(ask(name, 4, max_tokens=max_tokens))
        assert words[name] == [token for update in run(alone)[name] for token in update.new_token_ids]


def test_all_table_entries_come_again_after_a_preemption() -> None:
    made = engine(superpages=10)
    made.scheduler.add(ask("a", 4, max_tokens=12))
    made.scheduler.add(ask("b", 4, max_tokens=8))
    first_pieces = []
    for _ in turns(made):
        batch = made.scheduler.schedule()
        assert batch is not None
        first_pieces += [s for s in batch.sequences if s.request.request_id == "b" and s.start == 0]
        made.scheduler.commit(made.execute(batch))
    again: ScheduledSequence = first_pieces[1]
    assert {name: (new.first_index, len(new.pages)) for name, new in again.new_pages.items()} == {
        "global": (0, 4),
        "local": (0, 4),
    }
    assert len(again.output_token_ids) >= 4


def test_the_evicted_one_goes_before_those_that_came_later() -> None:
    made = engine(superpages=10, max_running=2)
    made.scheduler.add(ask("a", 4, max_tokens=12))
    made.scheduler.add(ask("b", 4, max_tokens=8))
    made.scheduler.add(ask("c", 2, max_tokens=1))
    order = [name for step in steps(made) for name, start, _ in step if start == 0]
    assert order == ["a", "b", "b", "c"]


def test_a_running_request_of_lower_priority_makes_way() -> None:
    made = engine(max_running=2)
    made.scheduler.add(ask("old", 2, max_tokens=9))
    made.scheduler.add(ask("young", 2, max_tokens=9))
    made.step()
    made.scheduler.add(ask("urgent", 2, max_tokens=2, priority=1))
    batch = made.scheduler.schedule()
    assert pieces(batch) == [("old", 2, 3), ("urgent", 0, 2)]
    assert batch is not None
    assert made.scheduler.commit(made.execute(batch)).stats.num_preemptions == 1


def test_equal_priority_never_makes_way() -> None:
    made = engine(max_running=1)
    made.scheduler.add(ask("a", 2, max_tokens=5))
    made.step()
    made.scheduler.add(ask("b", 2, max_tokens=5))
    assert {name for step in steps(made)[:4] for name, _, _ in step} == {"a"}


def test_a_large_prompt_that_waits_for_memory_is_not_overtaken() -> None:
    made = engine(superpages=14)
    made.scheduler.add(ask("a", 8, max_tokens=8))
    made.step()
    made.scheduler.add(ask("large", 16, max_tokens=1))
    made.scheduler.add(ask("small", 1, max_tokens=1))
    order = [name for step in steps(made) for name, start, _ in step if start == 0]
    assert order == ["large", "small"]


def test_a_prompt_starts_only_when_all_its_tokens_find_room() -> None:
    """Else its pieces would fill the pool and be evicted half computed."""
    made = engine(superpages=18)
    made.scheduler.add(ask("a", 8, max_tokens=6))
    made.step()
    made.scheduler.add(ask("b", 24, max_tokens=1))
    assert made.scheduler.kv.num_available > 5  # its first piece alone would fit
    seen = steps(made)
    assert [step for step in seen if step[0][0] == "b"] == [[("b", 0, 8)], [("b", 8, 16)], [("b", 16, 24)]]
    assert all(len(step) == 1 for step in seen)


def test_a_newcomer_leaves_each_running_one_its_next_page() -> None:
    """Two pages are free when b comes: it would fill both, and a's next page would be taken from it."""
    made = engine(superpages=6)
    made.scheduler.add(ask("a", 4, max_tokens=6))
    made.step()
    made.scheduler.add(ask("b", 3, max_tokens=1))
    assert [[name for name, _, _ in step] for step in steps(made)] == [["a"]] * 5 + [["b"]]


def test_a_prompt_without_pages_waits_for_younger_decodes_to_end() -> None:
    """d outgrows the page kept for it while the long prompt p is computed. Evicting d would lose its work; it ends soon anyway."""
    made = engine(superpages=20, max_tokens_per_step=5)
    made.scheduler.add(ask("p", 32, max_tokens=1))
    made.scheduler.add(ask("d", 1, max_tokens=8))
    seen, preemptions = [], 0
    for _ in turns(made):
        batch = made.scheduler.schedule()
        assert batch is not None
        seen.append([name for name, _, _ in pieces(batch)])
        preemptions += made.scheduler.commit(made.execute(batch)).stats.num_preemptions
    assert preemptions == 0
    assert seen == [["p"], ["p", "d"], *[["d", "p"]] * 5, *[["d"]] * 2, ["p"]]


def test_a_worse_prompt_does_not_take_the_pages_a_better_one_waits_for() -> None:
    """In step 8 too little is free for p's last piece, but enough for e's. What the decodes give back later must come to p first."""
    made = engine(superpages=70, max_tokens_per_step=18, max_context=100)
    for name, prompt_len, max_tokens in (("p", 64, 1), ("e", 59, 1), ("d0", 1, 8), ("d1", 1, 8)):
        made.scheduler.add(ask(name, prompt_len, max_tokens=max_tokens, max_total_tokens=100))
    names = [[name for name, _, _ in step] for step in steps(made)]
    assert names == [["p", "e", "d0", "d1"], *[["d0", "d1", "p", "e"]] * 6, ["d0", "d1"], ["p", "e"]]


# --- prefix cache ----------------------------------------------------------------------------------------------------------------------


def computed(made: SimulatedEngine) -> int:
    """Tokens computed until all work is done."""
    run(made)
    return made.memory.num_written


def shared(request_id: str, length: int, own: int, tail: int = 0, **fields: object) -> Request:
    """A prompt of `length` tokens that all have, then three of its own and `tail` more."""
    prompt = [*range(length), 900 + own, 901 + own, 902 + own, *[500] * tail]
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=1),
        eos_token_ids=(),
        max_total_tokens=64,
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("length", [2, 7, 8, 9, 13, 16, 23])
def test_requests_of_one_beginning_compute_it_once(length: int) -> None:
    """All at once, and more than a step computes: each computes its own tokens and at most page_size − 1 of the others'."""
    made = engine(max_tokens_per_step=16, prefix_cache=True)
    for i in range(6):
        made.scheduler.add(shared(f"r{i}", length, 10 * i))
    assert computed(made) == length + 3 + 5 * (3 + length % 2)


def test_the_beginning_is_found_after_its_request_has_passed_the_border() -> None:
    made = engine(prefix_cache=True)
    made.scheduler.add(ask("long", 13, max_tokens=20))
    run(made)
    before = made.memory.num_written
    made.scheduler.add(ask("again", 13, max_tokens=1))
    update = run(made)["again"][-1]
    assert update.num_cached_tokens == 12
    assert made.memory.num_written == before + 1


def test_without_its_local_tail_a_beginning_is_good_to_the_border() -> None:
    """13 tokens: 12 were shared in full pages, and with the chunk from 8 on evicted, 8 are."""
    made = engine(superpages=18, prefix_cache=True)
    made.scheduler.add(ask("a", 13, max_tokens=1))
    run(made)
    made.scheduler.add(shared("other", 0, 0, tail=20))
    run(made)
    made.scheduler.add(ask("again", 13, max_tokens=1))
    assert run(made)["again"][-1].num_cached_tokens == 8


def test_tenants_do_not_find_each_others_pages() -> None:
    made = engine(prefix_cache=True)
    for i, salt in enumerate(("", "x", "x")):
        made.scheduler.add(shared(f"r{i}", 8, 0, cache_salt=salt))
        run(made)
    assert made.memory.num_written == 11 + 11 + 1


def test_a_preempted_request_finds_its_own_pages_again() -> None:
    made = engine(superpages=12, prefix_cache=True)
    made.scheduler.add(ask("a", 4, max_tokens=12))
    made.scheduler.add(shared("b", 4, 50))
    run(made)
    alone = 4 + 11 + 3 + 4 - 4
    assert made.memory.num_written <= alone + 2


def test_asking_for_prompt_logprobs_computes_every_token() -> None:
    made = engine(prefix_cache=True)
    for name in ("a", "b"):
        made.scheduler.add(ask(name, 9, max_tokens=1, prompt_logprobs=0))
        update = run(made)[name][-1]
    assert made.memory.num_written == 18
    assert update.num_cached_tokens == 0


# --- ends ------------------------------------------------------------------------------------------------------------------------------


def play(request: Request, tokens: Sequence[int]) -> list[SequenceUpdate]:
    """Feed the request the tokens a sampler would draw, until it ends."""
    kv = KVManager(GROUPS, 2, 201, prefix_cache=False)
    scheduler = Scheduler(SchedulerLimits(max_running=1, max_tokens_per_step=64, chunk_size=8, max_context=64), kv)
    scheduler.add(request)
    updates: list[SequenceUpdate] = []
    for token in tokens:
        if scheduler.schedule() is None:
            break
        drawn = DrawnTokens(request_id=request.request_id, token_ids=[token])
        updates += scheduler.commit(StepTokens(drawn=[drawn])).updates
    return updates


@pytest.mark.parametrize(
    ("params", "tokens", "words", "reason", "stop_token_id"),
    [
        ({}, [5, 2], [5, 2], FinishReason.STOP, 2),
        ({"stop_token_ids": (7,)}, [5, 7, 9], [5, 7], FinishReason.STOP, 7),
        ({"min_tokens": 2}, [2, 2, 2], [2, 2, 2], FinishReason.STOP, 2),
        ({"max_tokens": 3}, [5, 6, 8, 9], [5, 6, 8], FinishReason.LENGTH, None),
        ({"max_tokens": 2}, [5, 2], [5, 2], FinishReason.STOP, 2),
        ({"max_tokens": None, "max_total_tokens": 6}, [5, 6, 8], [5, 6], FinishReason.LENGTH, None),
        ({"max_tokens": 9, "max_total_tokens": 5}, [5, 6], [5], FinishReason.LENGTH, None),
    ],
)
def test_an_answer_ends_at_eos_stop_id_or_length(
    params: dict[str, object], tokens: list[int], words: list[int], reason: FinishReason, stop_token_id: int | None
) -> None:
    updates = play(ask("a", 4, **{"max_tokens": 8, "eos": (2,), **params}), tokens)  # type: ignore[arg-type]
    assert [token for update in updates for token in update.new_token_ids] == words
    assert [update.finish_reason for update in updates] == [None] * (len(words) - 1) + [reason]
    assert updates[-1].stop_token_id == stop_token_id


def test_logprobs_of_the_drawn_token_are_passed_on() -> None:
    made = engine()
    made.scheduler.add(ask("a", 2, max_tokens=2, logprobs=0))
    made.scheduler.add(ask("b", 2, max_tokens=2))
    updates = run(made)
    assert [len(update.logprobs) for update in updates["a"]] == [1, 1]
    assert [len(update.logprobs) for update in updates["b"]] == [0, 0]


def test_prompt_logprobs_come_piece_by_piece_and_once() -> None:
    """Position 0 has none; piece [0, 8) brings those of 1 … 8."""
    made = engine()
    made.scheduler.add(ask("a", 11, max_tokens=2, prompt_logprobs=0))
    brought = [update.prompt_logprobs for update in run(made)["a"]]
    assert brought[0][0] is None
    positions = [[round(-entry.logprob) for entry in piece if entry is not None] for piece in brought]
    assert positions == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10], []]


def test_prompt_logprobs_are_not_sent_again_after_a_preemption() -> None:
    made = engine(superpages=10)
    made.scheduler.add(ask("a", 4, max_tokens=12))
    made.scheduler.add(ask("b", 4, max_tokens=8, prompt_logprobs=0))
    preemptions, entries = 0, list[TokenLogprobs | None]()
    for _ in turns(made):
        output = made.step()
        preemptions += output.stats.num_preemptions
        entries += [entry for update in output.updates for entry in update.prompt_logprobs]
    assert preemptions == 1
    assert [entry and round(-entry.logprob) for entry in entries] == [None, 1, 2, 3]


def test_a_draw_that_fails_ends_that_request_alone() -> None:
    made = engine(failing={"bad"})
    made.scheduler.add(ask("good", 2, max_tokens=2))
    made.scheduler.add(ask("bad", 2, max_tokens=2))
    updates = run(made)
    assert [(u.finish_reason, u.error, u.new_token_ids) for u in updates["bad"]] == [
        (FinishReason.ERROR, "the sampler failed", ())
    ]
    assert [u.finish_reason for u in updates["good"]] == [None, FinishReason.LENGTH]
    assert made.scheduler.kv.pages_used == {"global": 0, "local": 0}


# --- aborts, refusals, misuse ----------------------------------------------------------------------------------------------------------


def test_an_abort_frees_a_running_and_a_waiting_request_at_once() -> None:
    made = engine(max_running=1)
    made.scheduler.add(ask("running", 5))
    made.scheduler.add(ask("waiting", 5))
    made.step()
    assert made.scheduler.kv.pages_used["global"] == 3
    for name in ("running", "waiting", "nobody"):
        made.scheduler.abort(name)
    assert made.scheduler.kv.pages_used == {"global": 0, "local": 0}
    assert made.scheduler.has_work  # the client waits for the word
    output = made.step()
    assert [(u.request_id, u.finish_reason) for u in output.updates] == [
        ("running", FinishReason.ABORT),
        ("waiting", FinishReason.ABORT),
    ]
    assert (output.stats.num_running, output.stats.num_waiting) == (0, 0)
    assert not made.scheduler.has_work


def test_a_request_aborted_while_its_step_is_computed_gets_no_more_words() -> None:
    made = engine()
    made.scheduler.add(ask("a", 5))
    made.scheduler.add(ask("b", 5))
    batch = made.scheduler.schedule()
    assert batch is not None
    tokens = made.execute(batch)
    made.scheduler.abort("a")
    made.scheduler.add(ask("a", 3))  # its id is free again
    output = made.scheduler.commit(tokens)
    assert [(u.request_id, u.finish_reason, len(u.new_token_ids)) for u in output.updates] == [
        ("a", FinishReason.ABORT, 0),
        ("b", None, 1),
    ]
    made.scheduler.check_integrity()
    assert [u.finish_reason for u in run(made)["a"]] == [None, None, None, FinishReason.LENGTH]


def test_an_id_in_use_is_refused() -> None:
    made = engine()
    made.scheduler.add(ask("a", 5))
    with pytest.raises(RequestError, match="'a' is in use"):
        made.scheduler.add(ask("a", 2))
    assert len(run(made)["a"]) == 4


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask("a", 0), "the prompt has 0 tokens"),
        (ask("a", 4, max_total_tokens=65), "may grow to 65 tokens; the context holds 64"),
        (ask("a", 9, max_total_tokens=9), "the prompt has 9 tokens and the request may have 9 in all"),
        (
            ask("a", 9, max_tokens=3),
            "9 prompt tokens and up to 3 new ones are 12 tokens, more than .* one request \\(11\\)",
        ),
    ],
)
def test_what_could_never_finish_is_refused_with_the_numbers(request_: Request, message: str) -> None:
    made = engine(superpages=6)
    made.scheduler.add(request_)
    (update,) = run(made)["a"]
    assert update.finish_reason is FinishReason.ERROR
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(update.error)


def test_what_just_fits_alone_is_served() -> None:
    made = engine(superpages=6)
    made.scheduler.add(ask("a", 9, max_tokens=2))
    assert run(made)["a"][-1].finish_reason is FinishReason.LENGTH


def test_stats_count_the_step_and_gauge_what_is_left() -> None:
    made = engine(max_running=2)
    made.scheduler.add(ask("a", 5, max_tokens=3))
    made.step()
    made.scheduler.add(ask("b", 3))
    made.scheduler.add(ask("c", 3))
    stats = made.step().stats
    assert (stats.num_running, stats.num_waiting, stats.num_preemptions) == (2, 1, 0)
    assert (stats.num_prefill_tokens, stats.num_decode_tokens) == (3, 1)
    assert stats.pages_used == {"global": 5, "local": 5}
    assert stats.pages_total == {"global": 200, "local": 3200}


def test_steps_out_of_order_are_refused() -> None:
    made = engine()
    assert made.scheduler.schedule() is None
    with pytest.raises(ValueError, match="1 draws came for 0"):
        made.scheduler.commit(StepTokens(drawn=[DrawnTokens(request_id="a", token_ids=[1])]))
    made.scheduler.add(ask("a", 9))
    assert made.scheduler.schedule() is not None
    with pytest.raises(RuntimeError, match="before the batch in flight was committed"):
        made.scheduler.schedule()
    with pytest.raises(ValueError, match="does not end its known tokens"):
        made.scheduler.commit(StepTokens(drawn=[DrawnTokens(request_id="a", token_ids=[1])]))


def test_draws_of_another_request_are_refused() -> None:
    made = engine()
    made.scheduler.add(ask("a", 3))
    assert made.scheduler.schedule() is not None
    with pytest.raises(ValueError, match="a draw for 'b' came where 'a' was scheduled"):
        made.scheduler.commit(StepTokens(drawn=[DrawnTokens(request_id="b", token_ids=[1])]))


def test_limits_and_memory_must_speak_of_one_model() -> None:
    kv = KVManager(GROUPS, 2, 10)
    with pytest.raises(ValueError, match="chunks of 16 tokens, the KV groups 8"):
        Scheduler(SchedulerLimits(max_running=1, max_tokens_per_step=1, chunk_size=16, max_context=8), kv)
    with pytest.raises(ValueError, match="max_tokens_per_step is 0"):
        SchedulerLimits(max_running=1, max_tokens_per_step=0, chunk_size=8, max_context=8)


def test_a_request_whose_guesses_are_wrong_is_given_no_more() -> None:
    """Another goes on: each is judged by its own."""
    made = engine()
    scheduler = made.scheduler
    scheduler.limits = replace(scheduler.limits, draft_floor=0.3)
    scheduler.add(ask("wrong", 3, 50))
    made.step()
    given = 0
    while any(seq.request.request_id == "wrong" for seq in scheduler.sequences):
        wanted = scheduler.draftable(1)
        for one in wanted:
            made.memory.enter(one)
        drafts = {one.request.request_id: Draft(token_ids=[999]) for one in wanted}
        given += "wrong" in drafts
        batch = scheduler.schedule(drafts)
        assert batch is not None
        scheduler.commit(made.execute(batch))
    assert given == 26, "0.5 · 0.98²⁶ is below 0.3"
    scheduler.add(ask("fresh", 3, 50))
    made.step()
    assert [wanted.request.request_id for wanted in scheduler.draftable(1)] == ["fresh"]
