"""Rows and naive versions shared by the sampling tests. The naive versions are written from the definitions, in Python floats, one row at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from l4core.plugin_api import SamplerRow, SamplingParams
from l4core.sampling.default import create
from l4core.sampling.pipeline import DrawRow, SamplingPipeline


@pytest.fixture(scope="session")
def sampler_row() -> Callable[..., SamplerRow]:
    """sampler_row(prompt=…, output=…, position=…, **params) → SamplerRow."""

    def make(prompt: Sequence[int] = (0,), output: Sequence[int] = (), position: int = 5, **params: Any) -> SamplerRow:
        return SamplerRow(
            params=SamplingParams(**params),
            parsed=None,
            prompt_token_ids=prompt,
            output_token_ids=output,
            position=position,
        )

    return make


@pytest.fixture(scope="session")
def pipeline() -> Callable[..., SamplingPipeline]:
    """pipeline(vocab_size, **more samplers)."""
    return lambda vocab_size, **more: SamplingPipeline({"default": create(), **more}, vocab_size=vocab_size)


@pytest.fixture(scope="session")
def draw_row() -> Callable[..., DrawRow]:
    """draw_row(pipeline, prompt=…, output=…, position=…, forbidden=…, **params) → DrawRow with seed 0 unless given."""

    def make(
        pipeline: SamplingPipeline,
        prompt: Sequence[int] = (0,),
        output: Sequence[int] = (),
        position: int = 5,
        forbidden: Sequence[int] = (),
        **params: Any,
    ) -> DrawRow:
        checked = SamplingParams(**{"seed": 0, **params})
        return DrawRow(
            params=checked,
            parsed=pipeline.check(checked),
            prompt_token_ids=prompt,
            output_token_ids=output,
            position=position,
            forbidden=forbidden,
        )

    return make


class Naive:
    """Definitions, in Python floats."""

    @staticmethod
    def penalties(
        logits: list[float], prompt: Sequence[int], output: Sequence[int], params: SamplingParams
    ) -> list[float]:
        changed = list(logits)
        for token in set(prompt) | set(output):
            r = params.repetition_penalty
            changed[token] = changed[token] / r if changed[token] > 0 else changed[token] * r
        for token, count in Counter(output).items():
            changed[token] -= params.frequency_penalty * count + params.presence_penalty
        return changed

    @staticmethod
    def ranking(logits: list[float]) -> list[int]:
        """Ids, best first, lower ids first among equals; forbidden ones left out."""
        return sorted((i for i, x in enumerate(logits) if x > -math.inf), key=lambda i: (-logits[i], i))

    @staticmethod
    def probs(logits: list[float], temperature: float) -> list[float]:
        best = max(logits)
        relative = [math.exp((x - best) / temperature) for x in logits]
        total = math.fsum(relative)
        return [x / total for x in relative]


@pytest.fixture(scope="session")
def naive() -> type[Naive]:
    return Naive
