"""Whether two tokens were as good as equally likely: in float32 the order of a sum decides then, and batches of other shapes add in another order."""

from __future__ import annotations

import torch

import l4core.sampling.pipeline as pipeline
from l4core import LLM, SamplingParams
from l4core.plugin_ops.sampling import scaled_logits
from l4core.sampling.noise import gumbel_noise

TIE = 2e-5
"""Scores are of size 1 to 10; rounding moves them by some 1e-6."""


def is_tie(llm: LLM, prompt: list[int], params: SamplingParams, index: int, tokens: tuple[int, int]) -> bool:
    """Whether these two tokens had nearly one score, the best of all, as output number `index` of the request. llm: without speculation."""
    position, found = len(prompt) + index, list[torch.Tensor]()
    engine_start, engine_draw = llm._built.engine.runner.pipeline.start, pipeline.draw

    def start(logits: torch.Tensor, rows):  # type: ignore[no-untyped-def]
        found.extend(logits[i].clone() for i, row in enumerate(rows) if row.position == position)
        return engine_start(logits, rows)

    def draw(logits: torch.Tensor, keys):  # type: ignore[no-untyped-def]
        for row, key in zip(logits, keys, strict=True):
            if key.position == position and key.temperature > 0:
                noise = gumbel_noise(torch.tensor([key.seed]), torch.tensor([position]), len(row), "cpu")[0]
                found.append(noise + scaled_logits(row[None], [key.temperature])[0])
            elif key.position == position:
                found.append(row.clone())
        return engine_draw(logits, keys)

    llm._built.engine.runner.pipeline.start = start  # type: ignore[method-assign]
    pipeline.draw = draw
    try:
        llm.generate([prompt], [params], use_tqdm=False)
    finally:
        del llm._built.engine.runner.pipeline.start  # type: ignore[misc]
        pipeline.draw = engine_draw
    scores = found[-1]
    return all(float(scores.max() - scores[token]) < TIE for token in tokens)
