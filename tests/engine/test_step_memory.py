"""The arithmetic of a step's memory against tensors that are really alive in one."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l4core.config import EngineConfig
from l4core.engine.inbox import Inbox
from l4core.engine.start.build import BuiltEngine, build_engine
from l4core.engine.start.capacity import load_config
from l4core.engine.start.step_memory import graph_bytes, needs_of, step_bytes, table_bytes
from l4core.model.config import ModelConfig
from l4core.request import Request, SamplingParams

TOKENS = 512


class LiveBytes(TorchDispatchMode):
    """Counts bytes of tensors made inside it for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _has_storage(t)}
        for tensor in tree_leaves(out):
            if _has_storage(tensor) and (key := tensor.untyped_storage()._cdata) not in known | self._known:
                storage = tensor.untyped_storage()
                self._known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _has_storage(leaf: object) -> bool:
    """A tensor, but no packed weight of a CPU library."""
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided


class Nothing:
    """Attention without memory of its own: that is the backend's `workspace_bytes`."""

    def plan(self, meta: object) -> None:
        del meta

    def attend(self, q: torch.Tensor, kv: object, plan: object, out: torch.Tensor) -> None:
        del q, kv, plan
        out.zero_()


def small(model: str, **changes: int) -> ModelConfig:
    """A released model's proportions, a sixteenth of its width."""
    config = load_config(model)
    cut = {name: getattr(config, name)[:4] for name in ("moe_layers", "rope_layers", "chunked_layers")}
    sizes = {
        "hidden_size": 320,
        "head_dim": 8,
        "intermediate_size": 512,
        "intermediate_size_mlp": 1024,
        "vocab_size": 2000,
    }
    return dataclasses.replace(config, num_layers=4, num_experts=4, **cut, **{**sizes, **changes})


def engine_of(config: ModelConfig) -> BuiltEngine:
    built = build_engine(
        EngineConfig(
            model="-",
            load_format="dummy",
            dtype="float32",
            device="cpu",
            expert_kernel="torch",  # another's memory is its `workspace_bytes`
            max_total_tokens=8192,
            max_running_requests=8,
        ),
        progress=False,
        model_config=config,
    )
    runner = built.engine.runner
    runner.backend = runner._planner.backend = Nothing()  # type: ignore[assignment]
    return built


def request(name: str, num_tokens: int) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[1 + i % 1000 for i in range(num_tokens)],
        params=SamplingParams(seed=0, max_tokens=2),
        eos_token_ids=(),
        max_total_tokens=num_tokens + 2,
    )


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("scout", {}),
        ("maverick", {}),
        ("scout", {"intermediate_size": 64}),  # one rank of eight: attention and the residual stream count
        ("scout", {"vocab_size": 100_000}),
    ],
)
def test_a_step_takes_what_was_said_and_no_more(model: str, changes: dict[str, int]) -> None:
    config = small(model, **changes)
    built = engine_of(config)
    built.engine.step(Inbox(requests=[request("warm", 64)]))  # tables of angles are made once
    said = step_bytes(config, num_tokens=TOKENS, num_rows=1, itemsize=4)
    with LiveBytes() as live:
        built.engine.step(Inbox(requests=[request("measured", TOKENS - 1)]))
    assert 0.6 * said < live.peak <= said


def test_tables_are_those_of_the_largest_context() -> None:
    config = load_config("scout")
    assert table_bytes(config, max_running=2, max_context=1000, page_size=64) == 4 * 2 * (16 + 256)
    needs = needs_of(
        config,
        weights=0,
        workspace=0,
        num_tokens=1,
        max_running=2,
        context_length=None,
        page_size=64,
        itemsize=2,
        device_bytes=10 * 49_152 * 64_000,
    )
    assert needs.tables == 4 * 2 * (10_000 + 256)  # not of 10,485,760 tokens, which this device cannot hold


def test_graphs_share_one_memory() -> None:
    config = load_config("scout")

    def size(*batches: int) -> int:
        return graph_bytes(config, batches, max_context=100_000, page_size=64, itemsize=2)

    assert size() == 0
    assert size(1, 64, 256) < 1.1 * size(256)
