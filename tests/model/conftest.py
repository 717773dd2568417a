"""transformers' models and their full-forward logits, built once a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from l4core.model.llama4 import Llama4
from l4core.testing.models.checkpoints import random_model, text_config
from model.harness import ours

SMALL: Mapping[str, Any] = {
    "layers": 4,
    "hidden": 64,
    "inter": 96,
    "inter_mlp": 160,
    "heads": 4,
    "head_dim": 16,
    "vocab": 256,
    "scale": 6.0,
}


@functools.cache
def _oracle(options: tuple[tuple[str, Any], ...]) -> Any:
    return random_model(text_config(**dict(options)))


@functools.cache
def _logits(options: tuple[tuple[str, Any], ...], length: int) -> torch.Tensor:
    with torch.inference_mode():
        return _oracle(options)(torch.tensor([prompt_of(length)]), use_cache=False).logits[0]


def prompt_of(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Case:
    """One configuration: transformers' model (hf), ours with the same weights, and transformers' logits of a prompt."""

    def __init__(self, **options: Any) -> None:
        self._key = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in options.items()))

    @property
    def hf(self) -> Any:
        return _oracle(self._key)

    def model(self, dtype: torch.dtype = torch.float32) -> Llama4:
        return ours(self.hf, dtype)

    def prompt(self, length: int) -> list[int]:
        return prompt_of(length)

    def logits(self, length: int) -> torch.Tensor:
        """float32 [length, V] of prompt(length): one full forward, no cache."""
        return _logits(self._key, length)


@pytest.fixture(scope="session")
def case() -> Callable[..., Case]:
    """case(**options of text_config): the tiny model of the parity bar (8 layers, 22 M parameters)."""
    return Case


@pytest.fixture(scope="session")
def small() -> Callable[..., Case]:
    """The same with 4 layers and 0.4 M parameters."""
    return lambda **options: Case(**{**SMALL, **options})
