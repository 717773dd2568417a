from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4core.chat.stops import StopMatch, StopMatcher

STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)
BITS = st.lists(st.text(alphabet="ab", max_size=4), max_size=10)


def _brute(text: str, stops: list[str], floor: int) -> StopMatch | None:
    """The definition: the shortest beginning of the text that ends in a stop string and goes beyond `floor`."""
    for end in range(floor + 1, len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            stop = max(complete, key=len)
            return StopMatch(stop=stop, begin=end - len(stop), end=end)
    return None


@given(stops=STOPS, bits=BITS, num_free=st.integers(0, 3))
def test_matches_equal_the_definition_however_the_text_is_cut(stops: list[str], bits: list[str], num_free: int) -> None:
    matcher = StopMatcher(stops)
    found = None
    for i, bit in enumerate(bits):
        found = found or matcher.feed(bit, allowed=i >= num_free)
    assert found == _brute("".join(bits), stops, len("".join(bits[:num_free])))


@given(stops=STOPS, bits=BITS)
def test_open_characters_are_the_longest_possible_beginning(stops: list[str], bits: list[str]) -> None:
    matcher = StopMatcher(stops)
    for i, bit in enumerate(bits):
        matcher.feed(bit, allowed=False)
        text = "".join(bits[: i + 1])
        open_ends = [n for s in stops for n in range(len(s)) if text.endswith(s[:n])]
        assert matcher.num_open == max(open_ends)


@pytest.mark.parametrize(
    ("stop", "text", "begin"),
    [
        ("aab", "aaab", 1),
        ("abab", "aabab", 1),
        ("ababb", "abababb", 2),
        ("aabaa", "aabaabaa", 0),
        ("\n\n", "a\n\n\n", 1),
    ],
)
def test_a_stop_string_that_repeats_itself_is_found(stop: str, text: str, begin: int) -> None:
    assert StopMatcher([stop]).feed(text) == StopMatch(stop=stop, begin=begin, end=begin + len(stop))


def test_a_match_may_begin_in_text_that_did_not_count_yet() -> None:
    matcher = StopMatcher(["abab"])
    assert matcher.feed("abab", allowed=False) is None
    assert matcher.feed("ab") == StopMatch(stop="abab", begin=2, end=6)


def test_without_stop_strings_nothing_is_open() -> None:
    matcher = StopMatcher([])
    assert matcher.feed("anything") is None
    assert matcher.num_open == 0


def test_the_same_stop_string_twice() -> None:
    assert StopMatcher(["b", "b"]).feed("ab") == StopMatch(stop="b", begin=1, end=2)
