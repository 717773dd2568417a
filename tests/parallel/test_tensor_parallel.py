"""Tensor and expert parallelism: any number of ranks computes what one computes, in whole engines of threads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers.rank_serving import Served, compare, mixed_requests, serve, serve_over
from l4core.parallel.ranks import ALONE
from l4core.request import Request
from l4core.testing.checkpoints import make_tiny_checkpoint

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
