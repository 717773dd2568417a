"""Exclude top choices (XTC) on top of everything the default sampler does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from l4core.plugin_api import Sampler, SamplerRow, SamplingParams
from l4core.plugin_ops.sampling import coins, default_transform, scaled_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class XtcArgs:
    """threshold: tokens at least this likely are top choices.  probability: share of positions at which they are excluded."""

    threshold: float
    probability: float


class XtcSampler(Sampler):
    """A greedy request (temperature 0) is left alone: all its probability lies on one token, and the last top choice always stays."""

    def parse(self, params: SamplingParams) -> XtcArgs:
        unknown = set(params.sampler_args) - {"threshold", "probability"}
        if unknown:
            raise ValueError(f"xtc has no argument {sorted(unknown)[0]!r}; it takes threshold and probability")
        return XtcArgs(
            threshold=_number(params, "threshold", 0.1, largest=0.5),
            probability=_number(params, "probability", 0.5, largest=1.0),
        )

    def transform(self, logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
        logits = default_transform(logits, rows)
        sampled = [i for i, row in enumerate(rows) if row.params.temperature > 0]
        if sampled:
            index = torch.tensor(sampled, device=logits.device)
            logits[index] = _exclude(logits[index], [rows[i] for i in sampled])
        return logits


def create() -> Sampler:
    return XtcSampler()


def _exclude(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
    """Removes every token that is likelier than the least likely top choice, where the coin says so. With fewer than two there is nothing to
    remove. Top choices equally likely as the last one stay with it."""
    args = [row.parsed for row in rows if isinstance(row.parsed, XtcArgs)]
    threshold = torch.tensor([a.threshold for a in args], device=logits.device)[:, None]
    chance = torch.tensor([a.probability for a in args], device=logits.device)
    probs = scaled_logits(logits, [row.params.temperature for row in rows]).softmax(dim=1)
    last = torch.where((probs >= threshold) & (probs > 0), probs, math.inf).amin(dim=1, keepdim=True)
    acts = coins(rows, "xtc", logits.device) < chance
    return logits.masked_fill((probs > last) & acts[:, None], -math.inf)


def _number(params: SamplingParams, name: str, default: float, *, largest: float) -> float:
    value = params.sampler_args.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= largest:
        raise ValueError(f"xtc: {name} is {value!r}; wanted a number from 0 to {largest}")
    return float(value)
