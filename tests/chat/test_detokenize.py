from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from l4core.chat.detokenize import ByteLevelDetokenizer, WindowDetokenizer, make_detokenizer
from l4core.chat.tokenizer import Tokenizer

TEXT = "Être 東京 🙂👩‍👩‍👧 e\u0301 שלום \U0001f1eb\U0001f1f7 end"


def _stream(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool) -> list[str]:
    made = make_detokenizer(tokenizer, skip_special=skip_special)
    return [*(made.add([i]) for i in ids), made.finish()]


@given(ids=st.lists(st.integers(0, 520), max_size=40), skip=st.booleans())
def test_pieces_of_any_ids_put_together_equal_the_whole(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    assert "".join(_stream(tokenizer, ids, skip_special=skip)) == tokenizer.decode(ids, skip_special=skip)


@given(text=st.text(max_size=30))
def test_no_piece_of_a_text_ends_inside_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text, allow_special=False)
    pieces = _stream(tokenizer, ids, skip_special=True)
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    assert all("\ufffd" not in p for p in pieces) or "\ufffd" in text


def test_characters_come_as_soon_as_they_are_whole(tokenizer: Tokenizer) -> None:
    ids = [i for byte in "é🙂x".encode() for i in _byte_ids(tokenizer, byte)]
    assert _stream(tokenizer, ids, skip_special=True) == ["", "é", "", "", "", "🙂", "x", ""]


def test_an_incomplete_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    ids = [i for byte in "🙂".encode()[:3] for i in _byte_ids(tokenizer, byte)]
    assert _stream(tokenizer, ids, skip_special=True) == ["", "", "", "\ufffd"]


def test_special_tokens_are_shown_only_when_asked(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode_text("hi", allow_special=False), tokenizer.special_id("<|eot|>")]
    assert "".join(_stream(tokenizer, ids, skip_special=True)) == "hi"
    assert "".join(_stream(tokenizer, ids, skip_special=False)) == "hi<|eot|>"


def _byte_ids(tokenizer: Tokenizer, byte: int) -> list[int]:
    return [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([byte])][:1]


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    """The other family: pieces with ▁ for a space, a byte token for whatever is no piece, the first space of a text dropped."""
    words = ["▁", "▁the", "▁cap", "ital", "▁東", "京", "s", "▁▁", "\ufffd", "."]
    vocab = {token: i for i, token in enumerate([*(f"<0x{b:02X}>" for b in range(256)), *words])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    return Tokenizer(backend, source="test")


BYTE_RUNS = st.one_of(st.text(max_size=4).map(lambda t: list(t.encode())), st.lists(st.integers(0, 255), max_size=4))
WORDS = st.lists(st.integers(256, 270), max_size=4)


@given(parts=st.lists(st.one_of(BYTE_RUNS, WORDS), max_size=10), skip=st.booleans())
def test_byte_fallback_pieces_put_together_equal_the_whole(
    fallback: Tokenizer, parts: list[list[int]], skip: bool
) -> None:
    ids = [i for part in parts for i in part]
    assert "".join(_stream(fallback, ids, skip_special=skip)) == fallback.decode(ids, skip_special=skip)


def test_byte_fallback_holds_a_run_until_it_ends(fallback: Tokenizer) -> None:
    ids = [257, *"🙂".encode(), 262]
    assert _stream(fallback, ids, skip_special=True) == ["the", "", "", "", "", "🙂s", ""]


def test_each_kind_of_tokenizer_gets_its_way(tokenizer: Tokenizer, fallback: Tokenizer) -> None:
    assert isinstance(make_detokenizer(tokenizer, skip_special=True), ByteLevelDetokenizer)
    assert isinstance(make_detokenizer(fallback, skip_special=True), WindowDetokenizer)


class _Counting(Tokenizer):
    """Notes how many ids are decoded at a time."""

    longest = 0

    def decode(self, ids: list[int], *, skip_special: bool) -> str:  # type: ignore[override]
        self.longest = max(self.longest, len(ids))
        return super().decode(ids, skip_special=skip_special)


def test_work_per_token_does_not_grow_with_the_text(fallback: Tokenizer) -> None:
    counting = _Counting(fallback._backend, source="test")
    _stream(counting, [257, 258, 259, *"é".encode(), 262] * 200, skip_special=True)
    assert counting.longest <= 4


def test_bytes_of_byte_fallback_tokens(fallback: Tokenizer) -> None:
    assert fallback.token_bytes(0xE2) == b"\xe2"
    assert fallback.token_bytes(259) == b"ital"


def test_a_whole_text_of_every_kind_of_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_text(TEXT, allow_special=False)
    assert "".join(_stream(tokenizer, ids, skip_special=True)) == TEXT
