"""Dropping a finished chunk's local pages changes no answer: hybrid memory against a cache that keeps them. Freed pages hold NaN."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.recording import greedy
from l4core import LLM
from l4core.engine.inbox import Inbox
from l4core.errors import ConfigError
from l4core.request import Request

BORDERS = (1, 62, 63, 64, 65, 66, 127, 128, 129, 191, 192, 193)


def open_llm(tiny: Path, **options: object) -> LLM:
    llm = LLM(tiny.as_posix(), dtype="float32", device="cpu", progress=False, page_size=16, **options)  # type: ignore[arg-type]
    engine = llm._built.engine
    engine.scheduler.kv._on_empty = engine.runner.memory.poison
    return llm


def prompts() -> list[list[int]]:
    return [[(7 * n + 13 * i) % 250 for i in range(n)] for n in BORDERS]


@pytest.mark.parametrize("cached", [True, False])
def test_hybrid_equals_plain_around_every_border(tiny: Path, cached: bool) -> None:
    """Chunks of 64: prompts that end on, before and behind a border, and answers that grow over one. The second round finds prefixes."""
    params = greedy(12, logprobs=2)
    hybrid = open_llm(tiny, disable_radix_cache=not cached)
    plain = open_llm(tiny, disable_radix_cache=not cached, disable_hybrid_swa_memory=True)
    for _ in range(2 if cached else 1):
        for mine, theirs in zip(hybrid.generate(prompts(), params), plain.generate(prompts(), params), strict=True):
            assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
            for a, b in zip(mine.outputs[0].logprobs or [], theirs.outputs[0].logprobs or [], strict=True):
                assert a == pytest.approx(b, abs=1e-5)


def test_plain_memory_keeps_what_hybrid_drops(tiny: Path) -> None:
    """After 150 tokens hybrid memory holds the third chunk's two local pages, plain memory all ten. The plan counts it."""
    held, contexts = [], []
    for plain in (False, True):
        llm = open_llm(tiny, disable_hybrid_swa_memory=plain, disable_radix_cache=True, max_total_tokens=512)
        scheduler, engine = llm._built.engine.scheduler, llm._built.engine
        request = Request(
            request_id="r", prompt_token_ids=[5] * 150, params=greedy(9), eos_token_ids=(), max_total_tokens=300
        )
        engine.step(Inbox(requests=[request]))
        while not any(seq.is_decode for seq in scheduler.sequences):
            engine.step()
        held.append(scheduler.kv.pages_used)
        contexts.append(scheduler.kv.largest_alone())
    assert held == [{"global": 10, "local": 2}, {"global": 10, "local": 10}]
    assert contexts[0] > contexts[1] >= 512


def test_a_cap_on_local_kv_changes_no_answer(tiny: Path) -> None:
    """Memory for several requests' global pages and one chunk of local ones: requests take turns."""
    params = greedy(12, logprobs=1)
    options = {"context_length": 400, "max_total_tokens": 1600}
    capped, free = open_llm(tiny, swa_full_tokens_ratio=0.06, **options), open_llm(tiny, **options)
    kv = capped._built.engine.scheduler.kv
    assert kv.pages_total["local"] < free._built.engine.scheduler.kv.pages_total["local"] / 2
    for mine, theirs in zip(capped.generate(prompts(), params), free.generate(prompts(), params), strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        for a, b in zip(mine.outputs[0].logprobs or [], theirs.outputs[0].logprobs or [], strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_options_that_contradict_are_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="give one of the two"):
        open_llm(tiny, swa_full_tokens_ratio=0.5, disable_hybrid_swa_memory=True)
    for wrong, words in ((0.0, "wanted above 0"), (-0.5, "wanted above 0"), (1.5, "wanted at most 1")):
        with pytest.raises(ConfigError, match=words):
            open_llm(tiny, swa_full_tokens_ratio=wrong)
