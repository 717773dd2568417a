"""Manifests of the released models, expanded once; `tiny_folder` is made importable for the tests beside this file."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from l4core.model.config import ModelConfig
from l4core.model.safetensors_index import StoredTensor

sys.path.append(str(Path(__file__).parent))

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"


@dataclass(frozen=True)
class Manifest:
    name: str
    config: ModelConfig
    stored: dict[str, StoredTensor]


@pytest.fixture(scope="session")
def derive() -> ModuleType:
    spec = importlib.util.spec_from_file_location("derive", CHECKPOINTS / "derive.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def manifest(derive: ModuleType) -> Callable[[str], Manifest]:
    """Reads a manifest file by its short name; each is expanded once."""
    known: dict[str, Manifest] = {}

    def read(name: str) -> Manifest:
        if name not in known:
            raw = json.loads((CHECKPOINTS / f"{name}.json").read_text())
            stored = {n: StoredTensor(name=n, shape=s, dtype=d) for n, s, d in derive.expand(raw)}
            known[name] = Manifest(name, ModelConfig.from_dict(raw["config"]), stored)
        return known[name]

    return read
