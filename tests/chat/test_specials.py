from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from l4core.chat.specials import SpecialFlags, SpecialTokens, trie_pattern
from l4core.plugin_api import Special, Text

TOKENS = st.lists(st.text(alphabet="<|ab", min_size=1, max_size=5), min_size=1, max_size=6, unique=True)


@given(tokens=TOKENS, text=st.text(alphabet="<|ab", max_size=20))
def test_the_pattern_finds_the_longest_token_at_each_place(tokens: list[str], text: str) -> None:
    longest_first = "|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True))
    expected = [m.span() for m in re.finditer(longest_first, text)]
    assert [m.span() for m in re.finditer(trie_pattern(dict.fromkeys(tokens)), text)] == expected


@given(tokens=TOKENS, text=st.text(alphabet="<|ab", max_size=20))
def test_the_pieces_put_together_are_the_text(tokens: list[str], text: str) -> None:
    pieces = SpecialTokens(dict.fromkeys(tokens, SpecialFlags())).split(text)
    assert (
        "".join(p.token if isinstance(p, Special) else p.text for p in pieces if isinstance(p, (Special, Text))) == text
    )
    assert all(p.token in tokens for p in pieces if isinstance(p, Special))


def test_no_special_tokens_at_all() -> None:
    none = SpecialTokens({})
    assert none.split("<|eot|>") == [Text("<|eot|>")]
    assert none.telling_characters == frozenset()


def test_a_long_token_does_not_nest_deeply() -> None:
    token = "x" * 5000
    assert SpecialTokens({token: SpecialFlags()}).split("a" + token) == [Text("a"), Special(token)]


def test_membership_and_telling_characters() -> None:
    some = SpecialTokens({"<|eot|>": SpecialFlags(), "[INST]": SpecialFlags(), "a_b c": SpecialFlags()})
    assert "[INST]" in some
    assert "[inst]" not in some
    assert list(some) == ["<|eot|>", "[INST]", "a_b c"]
    assert some.telling_characters == frozenset("<|>[]ac")
