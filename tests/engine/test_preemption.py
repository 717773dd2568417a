"""A pool too small for all requests: they are preempted and computed again, on the real model, and nobody's answer changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.recording import greedy
from l4core import LLM

LENGTHS = (70, 30, 100, 64)


def prompts() -> list[list[int]]:
    return [[(7 * n + 13 * i) % 250 for i in range(n)] for n in LENGTHS]


@pytest.mark.parametrize("page_size", [16, 64])
def test_preempted_requests_get_the_tokens_of_an_ample_pool(tiny: Path, page_size: int) -> None:
    """Logprobs too, to 1e-5: recomputing a prompt in other pieces is the same function."""
    params = greedy(130, logprobs=2)
    options = {"dtype": "float32", "device": "cpu", "page_size": page_size, "progress": False}
    ample = LLM(tiny.as_posix(), **options).generate(prompts(), params)
    small = LLM(tiny.as_posix(), max_total_tokens=320, context_length=320, **options)
    counted = count_preemptions(small)
    for mine, theirs in zip(small.generate(prompts(), params), ample, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        for a, b in zip(mine.outputs[0].logprobs or [], theirs.outputs[0].logprobs or [], strict=True):
            assert a == pytest.approx(b, abs=1e-5)
    assert sum(counted) > 0, "the pool was large enough; nothing was shown"


def count_preemptions(llm: LLM) -> list[int]:
    """Filled, step by step, from what the engine itself reports."""
    engine, counted = llm._built.engine, []
    step = engine.step

    def counting_step(*args: object) -> object:
        output = step(*args)  # type: ignore[arg-type]
        counted.append(output.stats.num_preemptions)
        return output

    engine.step = counting_step  # type: ignore[assignment, method-assign]
    return counted
