"""Logprobs as texts: what ids share, what JSON cannot spell."""

from __future__ import annotations

import math

import pytest

from l4core.chat.byte_tokenizer import build_byte_tokenizer
from l4core.chat.tokenizer import Tokenizer
from l4core.request import TokenLogprobs
from l4core.server.logprobs import CompletionLogprobShaper, chat_logprobs, prompt_logprobs


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_byte_tokenizer(300), source="a test")


def test_of_two_tokens_with_one_text_the_better_counts(tokenizer: Tokenizer) -> None:
    """Bytes that are no whole character all read U+FFFD: the chosen, worse one must not hide that it was not the best."""
    best, chosen = tokenizer.encode_text("é🙂", allow_special=False)[0:3:2]
    assert tokenizer.decode([best], skip_special=False) == tokenizer.decode([chosen], skip_special=False) == "\ufffd"
    entry = TokenLogprobs(token_id=chosen, logprob=-2.0, rank=2, top=[(best, -0.5)])
    shaped = CompletionLogprobShaper(tokenizer, num_top=1, skip_special=True).shape([chosen], [entry])
    assert shaped.top_logprobs == [{"\ufffd": -0.5}]
    assert shaped.token_logprobs == [-2.0]
    chat = chat_logprobs(tokenizer, [entry], 1).content[0]
    assert chat.bytes == list(tokenizer.token_bytes(chosen))
    assert chat.top_logprobs[0].bytes == list(tokenizer.token_bytes(best))
    assert chat.bytes != chat.top_logprobs[0].bytes


def test_minus_infinity_becomes_a_number(tokenizer: Tokenizer) -> None:
    entry = TokenLogprobs(token_id=5, logprob=-math.inf, rank=300, top=[(6, 0.0), (7, -math.inf)])
    assert chat_logprobs(tokenizer, [entry], 2).content[0].logprob == -9999.0
    assert [top.logprob for top in chat_logprobs(tokenizer, [entry], 2).content[0].top_logprobs] == [0.0, -9999.0]
    found = prompt_logprobs(tokenizer, [None, entry], 2)
    assert found[0] is None
    assert found[1] is not None
    assert {i: (c.logprob, c.rank) for i, c in found[1].items()} == {5: (-9999.0, 300), 6: (0.0, 1), 7: (-9999.0, 2)}


def test_no_more_candidates_are_shown_than_asked_for(tokenizer: Tokenizer) -> None:
    entry = TokenLogprobs(token_id=5, logprob=-1.0, rank=2, top=[(6, -0.5), (5, -1.0), (7, -3.0)])
    assert len(chat_logprobs(tokenizer, [entry], 2).content[0].top_logprobs) == 2
    for num_top, expected in ((0, 1), (1, 2), (2, 2), (3, 3)):
        shaped = CompletionLogprobShaper(tokenizer, num_top=num_top, skip_special=True).shape([5], [entry])
        top = shaped.top_logprobs[0]
        assert top is not None
        assert len(top) == expected
