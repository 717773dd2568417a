"""A pool too small for all requests: they are preempted and computed again, on the real model, and nobody's answer changes. Freed pages hold NaN."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.recording import greedy
from l4core import LLM

BORDERS = (1, 62, 63, 64, 65, 66, 127, 128, 129)
"""Around the borders of chunks of 64; 40 more tokens reach over the next."""


@pytest.mark.parametrize(("page_size", "lengths", "new"), [(16, BORDERS, 40), (64, (70, 30, 100, 64), 130)])
def test_preempted_requests_get_the_tokens_of_an_ample_pool(
    tiny: Path, page_size: int, lengths: tuple[int, ...], new: int
) -> None:
    """Logprobs too, to 1e-5: recomputing a prompt in other pieces is the same function."""
    prompts, params = [[(7 * n + 13 * i) % 250 for i in range(n)] for n in lengths], greedy(new, logprobs=2)
    options = {"dtype": "float32", "device": "cpu", "page_size": page_size, "progress": False}
    ample = LLM(tiny.as_posix(), **options).generate(prompts, params)
    small = LLM(tiny.as_posix(), max_total_tokens=320, context_length=320, **options)
    small._built.engine.scheduler.kv._on_empty = small._built.engine.runner.memory.poison
    counted = count_preemptions(small)
    for mine, theirs in zip(small.generate(prompts, params), ample, strict=True):
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
