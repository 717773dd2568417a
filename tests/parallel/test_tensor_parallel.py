"""Tensor and expert parallelism: any number of ranks computes what one computes, in whole engines of threads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from helpers.rank_processes import run_processes
from l4core.engine.start.build import ModelMaker, build_engine
from l4core.engine.start.capacity import load_config, rank_weight_bytes
from l4core.errors import ConfigError
from l4core.model.layout import parameters
from l4core.parallel.agree import ROWS
from l4core.parallel.ranks import ALONE, Ranks
from l4core.quant.formats import PLAIN, format_of
from l4core.request import Request
from l4core.testing.models.checkpoints import make_tiny_checkpoint
from l4core.testing.models.eagle3 import make_tiny_draft
from l4core.testing.ranks.serving import Served, compare, mixed_requests, rank_config_of, serve, serve_over
from l4core.testing.ranks.threads import run_ranks

SCOUT = {"layers": 4, "hidden": 64, "heads": 40, "kv_heads": 8, "head_dim": 8, "inter": 128, "experts": 4, "vocab": 512}
"""Scout's ratio of query to KV heads, 40 to 8; three local layers and a global one."""
MAVERICK = {**SCOUT, "heads": 16, "kv_heads": 2, "step": 2, "inter_mlp": 192, "experts": 8}
"""Every second layer dense; with 16 ranks eight share a KV head."""


@pytest.fixture(scope="module")
def requests() -> Sequence[Request]:
    return mixed_requests(64, vocab=512)


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("scout"), **SCOUT)


@pytest.fixture(scope="module")
def maverick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("maverick"), **MAVERICK)


@pytest.fixture(scope="module")
def scout_alone(scout: Path, requests: Sequence[Request]) -> Served:
    return serve(scout, requests, ALONE)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_compute_what_one_computes(
    scout: Path, scout_alone: Served, requests: Sequence[Request], size: int
) -> None:
    compare(serve_over(size, scout, requests), scout_alone)


def test_sixteen_ranks_of_two_kv_heads(maverick: Path, requests: Sequence[Request]) -> None:
    """Eight ranks have a copy of each KV head; every second layer is dense."""
    some = requests[:16]
    compare(serve_over(16, maverick, some), serve(maverick, some, ALONE))


def test_a_head_that_is_the_embedding(tmp_path: Path, requests: Sequence[Request]) -> None:
    folder, some = make_tiny_checkpoint(tmp_path, **SCOUT, tie=True), requests[:12]
    compare(serve_over(4, folder, some), serve(folder, some, ALONE))


@pytest.mark.parametrize(("size", "ep"), [(2, 2), (4, 2), (8, 4)])
def test_experts_dealt_out_to_groups_of_ranks(
    scout: Path, scout_alone: Served, requests: Sequence[Request], size: int, ep: int
) -> None:
    compare(serve_over(size, scout, requests, ep=ep), scout_alone)


@pytest.mark.parametrize(("quantization", "size", "ep"), [("fp8", 4, 1), ("fp8", 4, 2), ("int4", 2, 1), ("int4", 4, 2)])
def test_quantised_weights(tmp_path: Path, requests: Sequence[Request], quantization: str, size: int, ep: int) -> None:
    """int4 groups of 128 inputs stay whole: an expert of 512 is cut into at most four parts."""
    folder = make_tiny_checkpoint(tmp_path, **{**SCOUT, "inter": 512})
    some = requests[:12]
    ranks = serve_over(size, folder, some, quantization=quantization, ep=ep)
    compare(ranks, serve(folder, some, ALONE, quantization=quantization))


def test_sums_and_gathers_of_a_step_are_counted(scout: Path) -> None:
    """Two sums a layer and one for the embedding; one gather for the draw of a step, and one when the engine starts and one for each sum it
    tries there."""
    asked = mixed_requests(1, vocab=512, max_tokens=9)
    served = serve_over(2, scout, asked, keep=False)[0]
    assert served.num_steps == 9
    assert served.counts == {"all_reduce": 9 * (2 * 4 + 1) + len(ROWS), "all_gather": 9 + 1 + len(ROWS)}


@pytest.mark.parametrize(("size", "count"), [(2, 64), (8, 8)])
def test_processes_over_gloo(
    tmp_path: Path, scout: Path, scout_alone: Served, requests: Sequence[Request], size: int, count: int
) -> None:
    """The same as with threads, but sums are gloo's."""
    some = requests[:count]
    for rank in run_processes(size, partial(serve, scout, some, keep=False), tmp_path):
        assert rank.tokens == {request.request_id: scout_alone.tokens[request.request_id] for request in some}


def test_int4_groups_are_not_cut(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, **SCOUT)
    with pytest.raises(
        ConfigError, match=r"2 ranks cannot share the 128 inputs of layers.0.moe.shared.down.weight evenly"
    ):
        serve_over(2, folder, (), quantization="int4")


@pytest.mark.parametrize(("size", "topk", "own", "count"), [(2, 1, True, 64), (8, 1, False, 12), (4, 2, True, 5)])
def test_eagle3(
    tmp_path: Path,
    scout: Path,
    scout_alone: Served,
    requests: Sequence[Request],
    size: int,
    topk: int,
    own: bool,
    count: int,
) -> None:
    """Chains and trees, a draft with its own embedding and vocabulary and one with the target's: the tokens of no speculation, and the guesses of one
    rank (but for logits so near that rounding decides)."""
    target = json.loads((scout / "config.json").read_text())
    draft = make_tiny_draft(tmp_path, target, draft_vocab=104 if own else None, own_embed=own, aux_layers=(0, 2))
    options = {
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": draft.as_posix(),
        "speculative_eagle_topk": topk,
        "speculative_adaptive": "off",
    }
    some = requests[:count]
    alone = serve(scout, some, ALONE, keep=False, **options)
    assert alone.tokens == {name: scout_alone.tokens[name] for name in alone.tokens}
    for rank in serve_over(size, scout, some, keep=False, **options):
        assert rank.tokens == alone.tokens
        differ = sum(a != b for a, b in zip(rank.guesses, alone.guesses, strict=True))
        assert differ <= len(alone.guesses) // 100


@pytest.mark.parametrize(
    ("tp", "ep", "quantization"), [(1, 1, None), (8, 1, None), (8, 8, "fp8"), (4, 2, "int4"), (16, 1, "fp8")]
)
def test_a_rank_takes_the_bytes_that_plan_says(tp: int, ep: int, quantization: str | None) -> None:
    """Scout's whole shape, on the meta device."""
    config = load_config("scout") if tp < 16 else dataclasses.replace(load_config("scout"), num_q_heads=48)
    names = (parameter.name for parameter in parameters(config, ()))
    formats = {name: kept for name in names if (kept := format_of(name, quantization)) != PLAIN}
    ranks = Ranks()
    ranks.rank, ranks.size = tp - 1, tp
    model = ModelMaker(config=config, dtype=torch.bfloat16, formats=formats, ranks=ranks, ep=ep)(1)
    planned = rank_weight_bytes(config, tp, quantization or "bfloat16", ep=ep)
    assert sum(parameter.nbytes for parameter in model.parameters()) == planned


def test_engines_of_ranks_agree_on_memory_and_report_who_they_are(scout: Path) -> None:
    """Each counts its own weights; the smallest budget decides for all."""
    built = run_ranks(4, lambda ranks: build_engine(rank_config_of(scout, ranks, ep=2), ranks=ranks, progress=False))
    planned = rank_weight_bytes(built[0].model_config, 4, "bfloat16", ep=2) * 2  # float32 here
    assert {one.budget.needs.weights for one in built} == {planned}
    assert len({one.budget.kv for one in built}) == 1
    assert any("4 compute the model together, experts dealt out to 2 groups" in line for line in built[0].report)
