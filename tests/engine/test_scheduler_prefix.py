"""What requests of one beginning compute, in small cases with known answers."""

from __future__ import annotations

import pytest

from helpers.small_engine import ask, engine, run
from l4core.request import Request, SamplingParams
from l4core.testing.simulation import SimulatedEngine


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
