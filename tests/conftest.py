"""Shared by the whole suite: tiny random checkpoints, built once a run, and the number of cases (`make test-all` runs the full counts)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from helpers.profile import FULL

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

untimed = settings(
    deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)  # a loaded machine is no fault
settings.register_profile("quick", untimed)
settings.register_profile("full", untimed, max_examples=1000)
settings.load_profile("full" if FULL else "quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are collected only where there is a GPU: on a CPU they would prove nothing, and a skip would hide that."""
    import torch

    if not torch.accelerator.is_available():
        items[:] = [item for item in items if item.get_closest_marker("gpu") is None]


MakeTiny = Callable[..., Path]


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """make_tiny(**options of make_tiny_checkpoint) → folder with weights and a tokenizer; the same options give the same folder."""
    from l4core.testing.models.checkpoints import make_tiny_checkpoint
    from l4core.testing.models.tokenizers import make_byte_tokenizer

    made: dict[tuple[tuple[str, object], ...], Path] = {}
    root = tmp_path_factory.mktemp("checkpoints")

    def make(**options: object) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            folder, tokenizer = root / str(len(made)), root / "tokenizer"
            if not tokenizer.exists():
                make_byte_tokenizer(tokenizer)
            make_tiny_checkpoint(folder, tokenizer=tokenizer, **options)  # type: ignore[arg-type]
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny(make_tiny: MakeTiny) -> Path:
    """The plainest one: 8 layers (NoPE at 3 and 7), 4 experts, chunk 64."""
    return make_tiny()
