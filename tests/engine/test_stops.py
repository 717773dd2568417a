"""Which ids may not be drawn yet."""

from __future__ import annotations

from l4core.engine.schedule.stops import StopRule, forbidden_token_ids
from l4core.request import Request, SamplingParams


def ask(max_tokens: int | None, **params: object) -> Request:
    return Request(
        request_id="a",
        prompt_token_ids=[1, 2, 3],
        params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        eos_token_ids=(8, 9),
        max_total_tokens=10,
    )


def test_ends_are_forbidden_until_min_tokens_stand() -> None:
    request = ask(6, min_tokens=2, stop_token_ids=(5,))
    assert [set(forbidden_token_ids(request, n)) for n in range(4)] == [{5, 8, 9}, {5, 8, 9}, set(), set()]
    assert not forbidden_token_ids(ask(6), 0)


def test_the_rule_takes_the_smaller_of_max_tokens_and_the_room() -> None:
    assert StopRule.of(ask(6)).max_output == 6
    assert StopRule.of(ask(20)).max_output == 7
    assert StopRule.of(ask(None)).max_output == 7
    assert StopRule.of(ask(6, stop_token_ids=(5,))).end_ids == {5, 8, 9}
