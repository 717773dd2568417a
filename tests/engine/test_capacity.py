"""The planner's arithmetic against an independent table of upper bounds, and against SGLang's published contexts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from l4core import LLM
from l4core.cli.plan import speculation_of
from l4core.engine.start.capacity import DEVICES, GIB, Capacity, Setup, capacity, load_config, rank_weight_bytes
from l4core.errors import CapacityError, ConfigError
from l4core.testing.models.eagle3 import make_tiny_draft


def plan(model: str, gpu: str, **changes: object) -> Capacity:
    """Eight devices; 90 % of each, less 4 GiB for everything but weights and KV; no limit from the model."""
    total = int(DEVICES[gpu].gib * GIB)
    config = dataclasses.replace(load_config(model), max_position_embeddings=10**9)
    setup = Setup(memory_bytes=total, tp=8, fraction=0.9 - 4 * GIB / total)
    return capacity(config, dataclasses.replace(setup, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "weights", "gpu", "free_gib", "bf16", "fp8"),
    [
        ("scout", "bfloat16", "H100-80GB", 41.9, 7.27e6, 14.6e6),
        ("scout", "bfloat16", "H200", 96.5, 16.8e6, 33.7e6),
        ("scout", "bfloat16", "B200", 130.9, 22.8e6, 45.7e6),
        ("scout", "fp8", "H100-80GB", 54.4, 9.46e6, 19.0e6),
        ("maverick", "fp8", "H100-80GB", 20.0, 3.44e6, 6.93e6),
        ("maverick", "fp8", "H200", 74.6, 13.0e6, 26.0e6),
        ("maverick", "fp8", "B200", 109.0, 19.0e6, 38.0e6),
        ("maverick", "bfloat16", "H200", 28.3, 4.90e6, 9.85e6),
        ("maverick", "bfloat16", "B200", 62.7, 10.9e6, 21.9e6),
        ("maverick", "int4", "H100-80GB", 41.0, 7.12e6, 14.3e6),
    ],
)
def test_a_table_made_by_hand_is_reproduced(
    model: str, weights: str, gpu: str, free_gib: float, bf16: float, fp8: float
) -> None:
    """Within 3 %; that table counts the vision encoder (0.8 B parameters), which is not loaded here, and 16,384 local tokens."""
    found = plan(model, gpu, weights=weights)
    assert found.budget.kv / GIB == pytest.approx(free_gib, rel=0.03)
    assert found.kv.largest_context == pytest.approx(bf16, rel=0.03)
    assert plan(model, gpu, weights=weights, kv_bytes=1).kv.largest_context == pytest.approx(fp8, rel=0.03)


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    with pytest.raises(CapacityError, match=r"weights and workspace take 100.*GB"):
        plan("maverick", "H100-80GB")
    found = plan("scout", "H100-80GB")
    with pytest.raises(CapacityError, match=str(found.kv.largest_context)) as error:
        plan("scout", "H100-80GB", context_length=found.kv.largest_context + 1)
    assert f"--context-length {found.kv.largest_context}" in error.value.fix


@pytest.mark.parametrize(("gpu", "published"), [("H100-80GB", 5_000_000), ("H200", 10_000_000)])
def test_sglangs_published_contexts_fit_with_room(gpu: str, published: int) -> None:
    """SGLang's guide: 1M and 2.5M without the hybrid cache, 5M and 10M with it. It keeps more for prefill and splits its pools by a ratio, so it
    reaches 55 to 69 % of what the bytes hold; one pool for both groups needs no ratio."""
    most = plan("scout", gpu).kv.largest_context
    assert 0.55 * most < published < 0.70 * most


@pytest.mark.parametrize(("ratio", "tokens"), [(1.0, 1.6e6), (0.8, 1.9e6), (0.1, 5.0e6), (0.01, 6.3e6)])
def test_what_a_split_by_ratio_would_hold(ratio: float, tokens: float) -> None:
    """SGLang's arithmetic with 37 GiB for KV on each of eight H100s (what its reserve and the vision encoder leave of 80): the published 1M without
    and 5M with the hybrid cache, between the default ratio, which wins 18 %, and one small enough for a long request. One pool holds 6.4M."""
    config = dataclasses.replace(load_config("scout"), max_position_embeddings=10**9)
    weights = rank_weight_bytes(config, 8, "bfloat16")
    total = int(DEVICES["H100-80GB"].gib * GIB)
    found = capacity(config, Setup(memory_bytes=total, tp=8, fraction=(weights + 37 * GIB) / total))
    assert found.budget.kv == pytest.approx(37 * GIB, rel=1e-6)
    assert found.if_split(ratio) == pytest.approx(tokens, rel=0.03)
    assert found.kv.largest_context == pytest.approx(6.44e6, rel=0.01)


def test_the_gain_of_the_hybrid_cache_is_four_in_the_limit() -> None:
    found = plan("scout", "H200")
    plain = found.budget.kv // (48 * 2 * 128 * 2)  # every layer keeps every token of its one KV head
    assert 3.98 < found.kv.largest_context / plain < 4.0


def test_requests_at_once_fill_what_there_is() -> None:
    found = plan("scout", "H100-80GB")
    per_request = dict(found.at_once)
    assert per_request[1_000] == (found.budget.kv // found.kv.superpage_bytes - 1) // (6 + 16)
    assert per_request[128_000] == (found.budget.kv // found.kv.superpage_bytes - 1) // (667 + 128)


def test_ranks_must_share_evenly_and_models_be_known() -> None:
    with pytest.raises(ConfigError, match="7 tensor-parallel ranks"):
        plan("scout", "H200", tp=7)
    with pytest.raises(ConfigError, match="wanted a folder, scout or maverick"):
        load_config("llama-5")
    with pytest.raises(CapacityError, match=r"the device has 8\.59 GB"):
        capacity(load_config("scout"), Setup(memory_bytes=8 * GIB))


def test_the_engine_counts_as_the_planner_does(make_tiny: Callable[..., Path]) -> None:
    folder = make_tiny(layers=4, hidden=64, inter=96, inter_mlp=128, experts=3, vocab=300, step=2)
    options = {"max_running_requests": 8, "chunked_prefill_size": 512, "context_length": 200}
    with LLM(folder.as_posix(), dtype="bfloat16", device="cpu", progress=False, **options) as llm:
        budget, page_size = llm._built.budget, llm._built.engine.runner.memory.page_size
    setup = Setup(
        memory_bytes=budget.total,
        page_size=page_size,
        context_length=200,
        max_running=8,
        num_tokens=512,
        workspace=budget.needs.workspace,
    )
    assert capacity(load_config(str(folder)), setup).budget.needs == budget.needs


@pytest.mark.parametrize("flags", [{}, {"num_steps": 2}, {"eagle_topk": 3, "num_draft_tokens": 9}])
def test_the_engine_counts_a_draft_as_the_planner_does(
    make_tiny: Callable[..., Path], tmp_path: Path, flags: dict[str, int]
) -> None:
    """Its weights, an embedding of its own among them, what a step holds for it, and the rows that are verified."""
    folder = make_tiny(layers=4, hidden=64, inter=96, inter_mlp=128, experts=3, vocab=300, step=2)
    target = json.loads((folder / "config.json").read_text())
    draft = make_tiny_draft(tmp_path / "draft", target, aux_layers=[0, 1], own_embed=True)
    options: dict[str, Any] = {f"speculative_{name}": value for name, value in flags.items()}
    with LLM(
        folder.as_posix(),
        dtype="bfloat16",
        device="cpu",
        progress=False,
        attention_backend="reference",
        expert_kernel="torch",
        max_running_requests=8,
        chunked_prefill_size=512,
        context_length=200,
        page_size=16,
        speculative_algorithm="EAGLE3",
        speculative_draft_model_path=draft.as_posix(),
        **options,
    ) as llm:
        budget = llm._built.budget
    config = load_config(str(folder))
    setup = Setup(
        memory_bytes=budget.total,
        page_size=16,
        context_length=200,
        max_running=8,
        num_tokens=512,
        speculation=speculation_of(config, draft, **flags),
    )
    assert capacity(config, setup).budget.needs == budget.needs
