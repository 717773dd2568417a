"""The drafter NGRAM: what it finds, what it forgets, and that its memory of a sequence is the sequence."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given

from l4core.plugin_api import DraftContext, DraftRow, SamplingParams
from l4core.sampling.ngram import NgramDrafter, create


def row(prompt: Sequence[int], output: Sequence[int] = (), *, most: int = 8, request_id: str = "a") -> DraftRow:
    return DraftRow(
        request_id=request_id,
        params=SamplingParams(),
        prompt_token_ids=prompt,
        output_token_ids=output,
        max_tokens=most,
    )


def guesses(drafter: NgramDrafter, asked: DraftRow) -> list[int]:
    found, parents = drafter.propose([asked])
    assert parents.tolist() == [list(range(-1, found.shape[1] - 1))]
    own: list[int] = found[0].tolist()
    return own[: own.index(-1)] if -1 in own else own


def test_it_goes_on_as_the_last_time() -> None:
    drafter = NgramDrafter(num_draft_tokens=3)
    assert guesses(drafter, row([1, 2, 3, 4, 5, 6, 1, 2])) == [3, 4, 5]
    assert guesses(drafter, row([1, 2, 3, 4, 5, 6, 1, 2], most=2)) == [3, 4]


def test_the_longest_ending_wins_and_among_equals_the_latest() -> None:
    drafter = NgramDrafter(num_draft_tokens=1)
    assert guesses(drafter, row([7, 1, 2, 9, 8, 1, 2, 5, 7, 1, 2])) == [9]
    assert guesses(drafter, row([1, 2, 9, 3, 1, 2, 5, 4, 1, 2], request_id="b")) == [5]


def test_a_loop_goes_on_for_ever() -> None:
    assert guesses(NgramDrafter(num_draft_tokens=7), row([4, 1, 2, 3, 1, 2, 3])) == [1, 2, 3, 1, 2, 3, 1]


def test_nothing_is_guessed_when_nothing_occurred_before() -> None:
    drafter = NgramDrafter(num_draft_tokens=3)
    assert guesses(drafter, row([1, 2, 3])) == []
    assert guesses(drafter, row([1], request_id="b")) == []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.lists(st.integers(1, 9), max_size=12))
def test_piece_by_piece_or_at_once(tokens: list[int], pieces: list[int]) -> None:
    """What it says does not depend on how the sequence grew; within the window it is what a search from the end finds."""
    drafter, prompt, output = NgramDrafter(num_draft_tokens=4, window=64), tokens[:1], list[int]()
    rest = tokens[1:]
    for size in pieces:
        drafter.propose([row(prompt, output)])
        output += rest[:size]
        rest = rest[size:]
    assert guesses(drafter, row(prompt, output)) == by_search([*prompt, *output], 4)


def by_search(tokens: list[int], count: int) -> list[int]:
    for size in (4, 3, 2):
        for at in range(len(tokens) - 1, size - 1, -1):
            if size <= len(tokens) and tokens[at - size : at] == tokens[-size:]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[at + i])
                return text[len(tokens) :]
    return []


def test_only_the_window_is_remembered() -> None:
    drafter = NgramDrafter(num_draft_tokens=2, window=10)
    assert guesses(drafter, row([1, 2, 9, *range(20, 50), 1, 2])) == []
    assert guesses(drafter, row([1, 2, 9, *range(20, 50), 1, 2], [30, 1, 2])) == [30, 1]


def test_a_request_that_ended_is_forgotten() -> None:
    drafter = NgramDrafter(num_draft_tokens=2)
    guesses(drafter, row([1, 2, 3, 1, 2]))
    drafter.forget(["a", "nobody"])
    assert guesses(drafter, row([5, 6, 7, 5, 6])) == [7, 5]


def test_options_are_checked() -> None:
    def made(**options: str) -> object:
        logger = logging.getLogger()
        return create(DraftContext(vocab_size=9, num_draft_tokens=2, device="cpu", options=options, logger=logger))

    assert isinstance(made(longest="3", shortest="3", window="8"), NgramDrafter)
    for wrong in ({"longest": "many"}, {"shortest": "0"}, {"longest": "1"}, {"window": "3"}):
        with pytest.raises(ValueError, match=r"longest=many; wanted a whole number|wanted 1 ≤ shortest"):
            made(**wrong)
