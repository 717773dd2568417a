"""How requests end, are aborted or refused, and what misuse of the scheduler says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from helpers.small_engine import GROUPS, ask, engine, run, turns
from l4core.engine.batch import Draft, DrawnTokens, StepTokens
from l4core.engine.schedule.scheduler import Scheduler, SchedulerLimits
from l4core.errors import RequestError
from l4core.kv.manager import KVManager
from l4core.request import FinishReason, Request, SequenceUpdate, StepOutput, TokenLogprobs

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


def verify(
    guesses: Sequence[int], parents: Sequence[int], drawn: Sequence[int], error: str = "", **params: Any
) -> StepOutput:
    """One step of a request with eos 2, whose guesses brought what a runner would have drawn along their path."""
    made = engine()
    made.scheduler.add(ask("a", 3, **{"max_tokens": 20, "eos": (2,), **params}))
    made.step()
    (wanted,) = made.scheduler.draftable(len(guesses))
    made.memory.enter(wanted)
    made.scheduler.schedule({"a": Draft(token_ids=guesses, parents=parents)})
    return made.scheduler.commit(StepTokens(drawn=[DrawnTokens(request_id="a", token_ids=drawn, error=error)]))


@pytest.mark.parametrize(
    ("guesses", "parents", "drawn", "judged", "right"),
    [
        ([7, 8, 9], (), [5], (1, 1, 1), (0, 0, 0)),
        ([7, 8, 9], (), [7, 5], (1, 1, 1), (1, 0, 0)),
        ([7, 8, 9], (), [7, 8, 9, 5], (1, 1, 1), (1, 1, 1)),
        (
            [7, 2, 9],
            (),
            [7, 2, 9, 5],
            (1, 1, 0),
            (1, 1, 0),
        ),  # the end was guessed, what stands behind it never compared
        ([2, 8, 9], (), [2, 5], (1, 0, 0), (1, 0, 0)),
        ([7, 8, 9], (), [7, 2], (1, 1, 1), (1, 0, 0)),  # the end was not guessed: 8 was wrong there
        ([7, 8, 9], (), [7, 8, 9, 2], (1, 1, 1), (1, 1, 1)),
        ([7, 4, 2, 9], (-1, -1, 0, 2), [7, 2, 9, 5], (1, 1, 0), (1, 1, 0)),  # a tree: 4 beside 7, 2 below 7, 9 below 2
    ],
)
def test_guesses_behind_the_end_are_not_judged(
    guesses: list[int], parents: Sequence[int], drawn: list[int], judged: tuple[int, ...], right: tuple[int, ...]
) -> None:
    output = verify(guesses, parents, drawn)
    (update,) = output.updates
    stats = output.stats
    assert (stats.drafted_at, stats.accepted_at) == (judged, right)
    assert (stats.num_drafted_tokens, stats.num_guesses) == (len(guesses), len(judged))
    assert (update.num_drafted, update.num_accepted) == (len(guesses), sum(right))


def test_guesses_behind_a_row_that_fails_are_not_judged() -> None:
    """It is the row of a right guess."""
    failed = verify([7, 8, 9], (), [7], error="NaN")
    assert (failed.updates[0].finish_reason, failed.updates[0].num_accepted) == (FinishReason.ERROR, 1)
    assert (failed.stats.drafted_at, failed.stats.accepted_at) == ((1, 0, 0), (1, 0, 0))
