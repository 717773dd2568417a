"""A request's state: token slices over prompt and answer, prompt logprobs handed out once, rank order."""

from __future__ import annotations

import pytest

from l4core.engine.schedule.sequence import RankedQueue, SequenceState
from l4core.engine.schedule.stops import StopRule
from l4core.kv.tables import PageTables
from l4core.request import Request, SamplingParams, TokenLogprobs


def state(prompt_len: int = 5, rank: tuple[int, int] = (0, 1)) -> SequenceState:
    request = Request(
        request_id="a",
        prompt_token_ids=list(range(prompt_len)),
        params=SamplingParams(max_tokens=9),
        eos_token_ids=(),
        max_total_tokens=50,
    )
    return SequenceState(
        request=request,
        rank=rank,
        stops=StopRule.of(request),
        tables=PageTables(tables=[]),
        prompt_len=prompt_len,
        num_tokens=prompt_len,
    )


@pytest.mark.parametrize("begin", range(8))
@pytest.mark.parametrize("end", range(9))
def test_token_ids_slices_prompt_and_answer_as_one(begin: int, end: int) -> None:
    seq = state()
    for token in (70, 71, 72):
        seq.append(token)
    assert list(seq.token_ids(begin, end)) == [0, 1, 2, 3, 4, 70, 71, 72][begin:end]


def entries(start: int, end: int) -> list[TokenLogprobs | None]:
    made = [TokenLogprobs(token_id=i, logprob=-1.0, rank=1) for i in range(start + 1, min(end + 1, 5))]
    return [None, *made] if start == 0 else [*made]


@pytest.mark.parametrize("cuts", [[5], [1, 5], [2, 4, 5], [4, 5], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("evicted_after", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("again", [[7], [3, 7], [1, 2, 3, 4, 5, 6, 7]])
def test_prompt_logprobs_are_handed_out_once_however_the_pieces_are_cut(
    cuts: list[int], evicted_after: int, again: list[int]
) -> None:
    seq, got = state(), list[TokenLogprobs | None]()
    first_life = list(zip([0, *cuts], cuts, strict=False))[:evicted_after]
    second_life = list(zip([0, *again], again, strict=False))
    for start, end in [*first_life, *second_life]:
        if start < 5:
            got += seq.new_prompt_logprobs(start, entries(start, end))
    assert [entry and entry.token_id for entry in got] == [None, 1, 2, 3, 4]


def test_missing_prompt_logprobs_are_noticed() -> None:
    with pytest.raises(ValueError, match="came from position 4; wanted 0"):
        state().new_prompt_logprobs(3, entries(3, 5))


def test_the_queue_keeps_rank_order() -> None:
    queue = RankedQueue()
    low, old, young, high = state(rank=(1, 1)), state(rank=(0, 2)), state(rank=(0, 4)), state(rank=(-3, 9))
    for seq in (young, low, high, old):
        queue.add(seq)
    assert [*queue] == [high, old, young, low]
    assert [*reversed(queue)] == [low, young, old, high]
    assert (queue.first, queue.last, len(queue)) == (high, low, 4)
    queue.remove(old)
    assert [*queue] == [high, young, low]
