"""Samplers: changes of logits before the draw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l4core.request import SamplingParams

if TYPE_CHECKING:
    import torch

__all__ = ["Sampler", "SamplerEntry", "SamplerRow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerRow:
    """One row of logits. parsed: what this sampler's `parse` returned.  Token ids are the request's own; position is that of the token
    being drawn (= number of tokens before it)."""

    params: SamplingParams
    parsed: object
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    position: int


class Sampler(ABC):
    """A change of logits. The draw itself (Gumbel-max with counter-based noise) stays in core, so that speculation never changes a token."""

    @abstractmethod
    def parse(self, params: SamplingParams) -> object:
        """Check the request once (its own arguments are `params.sampler_args`). ValueError → HTTP 400 with its text."""

    @abstractmethod
    def transform(self, logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
        """logits: float32 [len(rows), vocab_size], not yet divided by the temperature; may be changed in place and returned. Row i must not
        depend on other rows; −inf forbids a token; at least one token must stay finite in each row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerEntry:
    """create: "package.module:function" → called with no argument, returns a Sampler. Chosen by `--sampler NAME` or the request field `sampler`."""

    name: str
    api: int
    create: str
