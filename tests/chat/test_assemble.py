from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4core.chat.assemble import Assembler, TextDelta
from l4core.chat.tokenizer import Tokenizer
from l4core.request import FinishReason, SamplingParams, SequenceUpdate, TokenLogprobs


def _params(**given: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1000, **given})


def _update(ids: list[int], **given: Any) -> SequenceUpdate:
    return SequenceUpdate(request_id="r:0", new_token_ids=ids, **given)


def _run(tokenizer: Tokenizer, ids: list[int], cuts: list[int], **given: Any) -> tuple[list[TextDelta], Assembler]:
    """Feed ids in runs of the given lengths, then one by one; the engine then ends by length."""
    made = Assembler(tokenizer, _params(**given))
    deltas, rest = [], list(ids)
    for cut in [*cuts, *[1] * len(ids)]:
        deltas.append(made.feed(_update(rest[:cut])))
        rest = rest[cut:]
    deltas.append(made.feed(_update([], finish_reason=FinishReason.LENGTH)))
    return deltas, made


def _logprobs(ids: list[int]) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(token_id=i, logprob=-float(k), rank=1, top=((i, -float(k)), (7, -9.0))) for k, i in enumerate(ids)
    ]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_text(text, allow_special=False)


def test_text_without_stop_strings_is_told_at_once(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "The capital of France is Paris.")
    deltas, made = _run(tokenizer, ids, [])
    assert [d.text for d in deltas[: len(ids)]] == [tokenizer.decode([i], skip_special=True) for i in ids]
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    output = made.output(3)
    assert (output.index, output.text, output.token_ids) == (3, "The capital of France is Paris.", ids)
    assert (output.finish_reason, output.stop_reason, output.logprobs) == ("length", None, None)


TEXTS = st.lists(st.sampled_from(["The", " cap", "STOP", "ST", "OP", "é", "🙂", "\n", "\n\n", "a"]), max_size=8).map(
    "".join
)
STOPS = st.lists(st.sampled_from(["STOP", "OP", "\n\n", "🙂", "TOPé", "aa"]), max_size=3)


@given(
    text=TEXTS,
    stops=STOPS,
    cuts=st.lists(st.integers(0, 4), max_size=6),
    include=st.booleans(),
    min_tokens=st.integers(0, 4),
)
def test_the_answer_is_the_same_however_updates_are_cut(
    tokenizer: Tokenizer, text: str, stops: list[str], cuts: list[int], include: bool, min_tokens: int
) -> None:
    ids = _ids(tokenizer, text)
    given_params = {"stop": stops, "include_stop_str_in_output": include, "min_tokens": min_tokens}
    deltas, made = _run(tokenizer, ids, cuts, **given_params)
    expected_text, num_tokens, stop = _expected(tokenizer, ids, stops, include, min_tokens)
    output = made.output(0)
    assert "".join(d.text for d in deltas) == output.text == expected_text
    assert [i for d in deltas for i in d.token_ids] == output.token_ids == ids[:num_tokens]
    assert output.finish_reason == ("length" if stop is None else "stop")
    assert output.stop_reason == stop


def _expected(
    tokenizer: Tokenizer, ids: list[int], stops: list[str], include: bool, min_tokens: int
) -> tuple[str, int, str | None]:
    """By definition: reveal token by token, character by character, and stop at the first complete stop string."""
    whole = tokenizer.decode(ids, skip_special=True)
    shown = 0
    for n in range(len(ids) + 1):
        prefix = tokenizer.decode(ids[:n], skip_special=True).rstrip("\ufffd")
        for end in range(shown + 1, len(prefix) + 1):
            complete = [s for s in stops if whole[:end].endswith(s)]
            if complete and n > min_tokens:
                stop = max(complete, key=len)
                return whole[: end if include else end - len(stop)], n, stop
        shown = max(shown, len(prefix))
    return whole, len(ids), None


@pytest.mark.parametrize(
    ("min_tokens", "text", "num_tokens"), [(0, "a", 2), (1, "a", 2), (2, "abc", 4), (3, "abc", 4), (4, "abc.d", 5)]
)
def test_a_stop_string_counts_only_after_min_tokens(
    tokenizer: Tokenizer, min_tokens: int, text: str, num_tokens: int
) -> None:
    ids = [i for character in "abc.d" for i in _ids(tokenizer, character)]
    _, made = _run(tokenizer, ids, [], stop=["b", "."], min_tokens=min_tokens)
    assert (made.output(0).text, len(made.output(0).token_ids)) == (text, num_tokens)


def test_text_that_may_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    made = Assembler(tokenizer, _params(stop="\nUser:"))
    assert made.feed(_update(_ids(tokenizer, "Hi\nUs"))).text == "Hi"
    assert made.feed(_update(_ids(tokenizer, "ual"))).text == "\nUsual"
    assert made.feed(_update(_ids(tokenizer, "\nUser"))).text == ""
    last = made.feed(_update(_ids(tokenizer, ": more")))
    assert (last.text, last.finish_reason, last.stop_reason, last.must_abort) == (
        "",
        FinishReason.STOP,
        "\nUser:",
        True,
    )
    assert made.output(0).text == "Hi\nUsual"


def test_held_back_text_is_told_when_the_answer_ends_otherwise(tokenizer: Tokenizer) -> None:
    made = Assembler(tokenizer, _params(stop="\nUser:"))
    made.feed(_update(_ids(tokenizer, "Hi\nUs")))
    end = made.feed(_update([], finish_reason=FinishReason.LENGTH))
    assert (end.text, end.finish_reason, end.must_abort) == ("\nUs", FinishReason.LENGTH, False)


def test_nothing_after_the_end_counts(tokenizer: Tokenizer) -> None:
    made = Assembler(tokenizer, _params(stop="b"))
    assert made.feed(_update(_ids(tokenizer, "abc"))).must_abort
    assert made.feed(_update(_ids(tokenizer, "xyz"), finish_reason=FinishReason.ABORT)) == TextDelta()
    assert made.output(0).text == "a"
    assert made.output(0).finish_reason == "stop"


def test_a_stop_string_at_the_engines_own_end_needs_no_abort(tokenizer: Tokenizer) -> None:
    made = Assembler(tokenizer, _params(stop="b"))
    end = made.feed(_update(_ids(tokenizer, "ab"), finish_reason=FinishReason.LENGTH))
    assert (end.finish_reason, end.stop_reason, end.must_abort) == (FinishReason.STOP, "b", False)


@pytest.mark.parametrize(
    ("options", "shown"),
    [({}, ""), ({"skip_special_tokens": False}, "<|eot|>"), ({"include_stop_str_in_output": True}, "")],
)
def test_the_end_token_is_counted_and_not_shown(tokenizer: Tokenizer, options: dict[str, Any], shown: str) -> None:
    eot = tokenizer.special_id("<|eot|>")
    made = Assembler(tokenizer, _params(**options))
    end = made.feed(_update([*_ids(tokenizer, "Paris."), eot], finish_reason=FinishReason.STOP, stop_token_id=eot))
    assert (end.text, end.stop_reason, end.must_abort) == ("Paris." + shown, None, False)
    assert end.token_ids[-1] == eot


@pytest.mark.parametrize(
    ("options", "shown"),
    [({}, ""), ({"skip_special_tokens": False}, "!"), ({"include_stop_str_in_output": True}, "!")],
)
def test_a_stop_token_that_was_asked_for_is_the_stop_reason(
    tokenizer: Tokenizer, options: dict[str, Any], shown: str
) -> None:
    (mark,) = _ids(tokenizer, "!")
    made = Assembler(tokenizer, _params(stop_token_ids=(mark,), **options))
    end = made.feed(_update([*_ids(tokenizer, "Paris"), mark], finish_reason=FinishReason.STOP, stop_token_id=mark))
    assert (end.text, end.stop_reason) == ("Paris" + shown, mark)


def test_an_incomplete_character_is_told_at_the_end(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "🙂")
    assert len(ids) > 1
    made = Assembler(tokenizer, _params())
    assert made.feed(_update(ids[:-1])).text == ""
    assert made.feed(_update([], finish_reason=FinishReason.LENGTH)).text == "\ufffd"


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_a_broken_answer_keeps_its_reason(tokenizer: Tokenizer, reason: FinishReason) -> None:
    made = Assembler(tokenizer, _params(stop="\ufffd"))
    made.feed(_update(_ids(tokenizer, "🙂")[:-1]))
    end = made.feed(_update([], finish_reason=reason, error="no memory"))
    assert (end.finish_reason, end.error, end.text, end.stop_reason) == (reason, "no memory", "\ufffd", None)


def test_logprobs_go_with_their_tokens_up_to_the_match(tokenizer: Tokenizer) -> None:
    ids = _ids(tokenizer, "abcd")
    made = Assembler(tokenizer, _params(stop="b", logprobs=1))
    delta = made.feed(_update(ids, logprobs=_logprobs(ids)))
    assert [p.token_id for p in delta.logprobs] == list(delta.token_ids) == ids[:2]
    output = made.output(0)
    assert output.logprobs == [{ids[0]: 0.0, 7: -9.0}, {ids[1]: -1.0, 7: -9.0}]
    assert list(output.logprobs[0]) == [ids[0], 7]
    assert output.token_logprobs == list(delta.logprobs)


def test_prompt_logprobs_and_cached_tokens_are_kept(tokenizer: Tokenizer) -> None:
    first, second = _logprobs([5, 6])
    made = Assembler(tokenizer, _params(prompt_logprobs=1))
    made.feed(_update([], prompt_logprobs=[None, first], num_cached_tokens=4))
    made.feed(_update([9], prompt_logprobs=[second]))
    assert made.prompt_logprobs() == [None, {5: 0.0, 7: -9.0}, {6: -1.0, 7: -9.0}]
    assert made.prompt_token_logprobs() == [None, first, second]
    assert made.num_cached_tokens == 4
    assert Assembler(tokenizer, _params()).prompt_logprobs() is None


def test_finished_says_so(tokenizer: Tokenizer) -> None:
    made = Assembler(tokenizer, _params())
    made.feed(_update([5]))
    assert not made.finished
    made.feed(_update([], finish_reason=FinishReason.LENGTH))
    assert made.finished
