"""The sampler `default`: penalties, logit bias, top-k, top-p, min-p. Made of plugin_ops.sampling alone, as any plugin could be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from l4core.plugin_api import Sampler, SamplerRow, SamplingParams
from l4core.plugin_ops.sampling import UNCHANGED, changes_logits, default_transform

if TYPE_CHECKING:
    import torch

__all__ = ["DefaultSampler", "create"]


class DefaultSampler(Sampler):
    """All of it is in SamplingParams; it takes no sampler_args."""

    def parse(self, params: SamplingParams) -> object:
        if params.sampler_args:
            names = ", ".join(sorted(params.sampler_args))
            raise ValueError(f"the sampler 'default' takes no sampler_args; found {names}")
        return None if changes_logits(params) else UNCHANGED

    def transform(self, logits: torch.Tensor, rows: Sequence[SamplerRow]) -> torch.Tensor:
        return default_transform(logits, rows)


def create() -> Sampler:
    """What the entry of the sampler `default` names."""
    return DefaultSampler()
