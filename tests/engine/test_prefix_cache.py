"""A prompt whose beginning was computed before gets the same tokens and logprobs as one computed whole. Freed pages hold NaN."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.recording import greedy
from l4core import LLM


def open_llm(tiny: Path, **options: object) -> LLM:
    llm = LLM(tiny.as_posix(), dtype="float32", device="cpu", progress=False, **options)  # type: ignore[arg-type]
    engine = llm._built.engine
    engine.scheduler.kv._on_empty = engine.runner.memory.poison
    return llm


def prompt(length: int, own: int = 0) -> list[int]:
    """The same for all but the last three tokens."""
    return [(7 * i) % 250 for i in range(length - 3)] + [own, own + 1, own + 2]


@pytest.mark.parametrize("page_size", [16, 64])
def test_a_hit_equals_a_miss_around_every_border(tiny: Path, page_size: int) -> None:
    cached, plain = open_llm(tiny, page_size=page_size), open_llm(tiny, page_size=page_size, disable_radix_cache=True)
    params = greedy(20, logprobs=2)
    found = []
    for length in (20, 62, 63, 64, 65, 66, 67, 68, 100, 127, 128, 129, 131, 192, 195, 200):
        for own in (0, 100):
            (mine,), (theirs,) = (llm.generate([prompt(length, own)], params) for llm in (cached, plain))
            found.append(mine.num_cached_tokens)
            assert theirs.num_cached_tokens == 0
            assert mine.num_cached_tokens % page_size == 0
            assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
            for a, b in zip(mine.outputs[0].logprobs or [], theirs.outputs[0].logprobs or [], strict=True):
                assert a == pytest.approx(b, abs=1e-5)
    assert sum(count > 0 for count in found) >= 16


def test_a_tiny_pool_evicts_and_nobodys_answer_changes(tiny: Path) -> None:
    """Prefixes are evicted and requests preempted while others find what is left."""
    options = {"page_size": 16, "max_total_tokens": 320, "context_length": 320}
    params = greedy(40, logprobs=1)
    prompts = [prompt(length, own) for own in (0, 100) for length in (70, 30, 140, 64, 129)]
    small, plain = open_llm(tiny, **options), open_llm(tiny, disable_radix_cache=True)
    for mine, theirs in zip(small.generate(prompts, params), plain.generate(prompts, params), strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        for a, b in zip(mine.outputs[0].logprobs or [], theirs.outputs[0].logprobs or [], strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_what_a_conversation_said_before_is_found(tiny: Path) -> None:
    """Its own answers are part of the next turn's prompt."""
    llm = open_llm(tiny, page_size=16)
    first = llm.generate([prompt(50)], greedy(30))[0]
    turn = prompt(50) + first.outputs[0].token_ids + [9, 9]
    assert llm.generate([turn], greedy(1))[0].num_cached_tokens == 64  # 79 tokens had KV: four full pages
