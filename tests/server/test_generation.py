"""What one call counts while its news are told."""

from __future__ import annotations

import asyncio
from typing import Any

from l4core.chat.assemble import Assembler
from l4core.chat.byte_tokenizer import build_byte_tokenizer
from l4core.chat.tokenizer import Tokenizer
from l4core.request import FinishReason, Request, SamplingParams, SequenceUpdate
from l4core.server.generation import Answer, Generation


class Stream:
    """Three steps that came before anybody looked."""

    async def next(self) -> list[SequenceUpdate]:
        ends = [None, None, FinishReason.LENGTH]
        return [SequenceUpdate(request_id="a", new_token_ids=[97], finish_reason=end) for end in ends]


def test_usage_grows_as_news_are_told_not_as_they_come() -> None:
    params = SamplingParams(max_tokens=3)
    request = Request(request_id="a", prompt_token_ids=[1, 2], params=params, eos_token_ids=(), max_total_tokens=5)
    tokenizer = Tokenizer(build_byte_tokenizer(300), source="a test")
    answer = Answer(index=0, prompt=0, request=request, assembler=Assembler(tokenizer, params))
    stream: Any = Stream()
    generation = Generation("id", params, [[1, 2]], [answer], stream, counts_output=True)
    told = asyncio.run(generation.next())
    assert [generation.usage().completion_tokens for _ in generation.tell(told)] == [1, 2, 3]
    assert generation.usage().total_tokens == 5
