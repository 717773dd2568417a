"""What passes in and out of sampling. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l4core.request import SamplingParams, TokenLogprobs

__all__ = ["Draw", "DrawKey", "DrawRow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawRow:
    """One row of logits to draw from.

    params: with a seed unless greedy.  parsed: what `SamplingPipeline.check(params)` returned.  prompt_token_ids: the same object in every step, so
    that it is converted once.  output_token_ids: tokens after the prompt and before this one.  position: of the token being drawn (= number of
    tokens before it).  forbidden: may not be drawn now (eos ids while the output is shorter than min_tokens).
    """

    params: SamplingParams
    parsed: object
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    position: int
    forbidden: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """The outcome of one row: a token (with logprobs if params ask), or an error that ends this request and no other."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawKey:
    """How one row is drawn. temperature: ≥ 0, 0 = greedy.  seed: any size, modulo 2^64 (not used by a greedy row).  position: of the token."""

    temperature: float
    seed: int
    position: int
