"""What a model would hold on some device, before anyone rents it: the arithmetic of start-up on numbers alone. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from l4core.engine.memory_budget import kv_share
from l4core.errors import CapacityError, ConfigError
from l4core.kv.planner import Footprint, KVPlan, plan_kv
from l4core.model.config import ModelConfig
from l4core.model.layout import Parameter, parameters
from l4core.model.slicing import check_world, rank_shape

GIB = 1 << 30
DEVICES: Mapping[str, float] = {
    "L4-24GB": 22.0,
    "A100-40GB": 39.4,
    "A100-80GB": 79.1,
    "H100-80GB": 79.1,
    "H200": 139.8,
    "B200": 178.0,
    "MI300X": 191.5,
    "MI355X": 287.5,
}
"""GiB that torch reports: of H100, H200 and B200 as it was seen, of the others what is sold, less up to two. `--memory` takes any number."""
PRESETS = ("scout", "maverick")
WEIGHTS: Mapping[str, float] = {"bfloat16": 2.0, "fp8": 1.0, "int4": 0.5 + 2 / 128}
"""Bytes an element of a linear layer, scales included where they count: int4 has one bfloat16 scale for 128 elements, on experts only."""
EXPERTS = (".moe.experts.", ".moe.shared.")
LINEAR = (*EXPERTS, ".attn.qkv.", ".attn.o.", ".mlp.")
"""Parts of the names of quantised parameters."""
LENGTHS = (1_000, 8_000, 32_000, 128_000, 1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is asked. memory_bytes: of one device.  weights: a key of WEIGHTS.  kv_bytes: of one stored element.  fraction: None = the default.
    local_ratio: cap on local KV (kv.planner.local_cap).  hybrid: local pages of finished chunks are dropped."""

    memory_bytes: int
    tp: int = 1
    weights: str = "bfloat16"
    kv_bytes: int = 2
    page_size: int = 64
    context_length: int | None = None
    max_running: int = 256
    fraction: float | None = None
    local_ratio: float | None = None
    hybrid: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What fits, on each of `setup.tp` devices. at_once: (tokens of one request, requests of that length together)."""

    setup: Setup
    weight_bytes: int
    kv_budget: int
    kv: KVPlan
    at_once: Sequence[tuple[int, int]]

    def json(self) -> dict[str, object]:
        return {
            "tp": self.setup.tp,
            "memory_bytes": self.setup.memory_bytes,
            "weight_bytes": self.weight_bytes,
            "kv_bytes": self.kv_budget,
            "page_size": self.kv.page_size,
            "superpage": dict(self.kv.shape.pages),
            "superpage_bytes": self.kv.superpage_bytes,
            "waste": dict(self.kv.waste),
            "max_context": self.kv.largest_context,
            "requests_at_once": {str(length): count for length, count in self.at_once},
        }


def load_config(model: str) -> ModelConfig:
    """A preset by name, or a folder. Raises ConfigError for what is neither, CheckpointError for a folder whose config cannot be used."""
    if model in PRESETS:
        text = (files("l4core.model") / "presets" / f"{model}.json").read_text()
        return ModelConfig.from_dict(json.loads(text))
    if not Path(model).is_dir():
        raise ConfigError(f"--model is {model!r}; wanted a folder, {' or '.join(PRESETS)}", fix="--model scout")
    return ModelConfig.from_folder(Path(model))


def capacity(config: ModelConfig, setup: Setup) -> Capacity:
    """Raises ConfigError for a tp or page size that does not divide, CapacityError when weights or context do not fit; it names what would."""
    check_world(config, setup.tp)
    weights = rank_weight_bytes(config, setup.tp, setup.weights)
    budget = kv_share(setup.memory_bytes, weights, setup.fraction)
    groups = config.kv_groups(hybrid=setup.hybrid)
    kv = plan_kv(
        groups,
        page_size=setup.page_size,
        num_kv_heads=max(1, config.num_kv_heads // setup.tp),
        head_dim=config.head_dim,
        bytes_per_element=setup.kv_bytes,
        budget_bytes=budget,
        context_length=setup.context_length,
        model_limit=config.max_position_embeddings,
        max_running=setup.max_running,
        max_total_tokens=None,
        local_ratio=setup.local_ratio,
    )
    footprint = Footprint(groups=groups, shape=kv.shape, page_size=kv.page_size, max_local=kv.max_local)
    usable = budget // kv.superpage_bytes - 1
    at_once = [(n, footprint.at_once(usable, n)) for n in LENGTHS if n <= kv.largest_context]
    return Capacity(setup=setup, weight_bytes=weights, kv_budget=budget, kv=kv, at_once=at_once)


def rank_weight_bytes(config: ModelConfig, tp: int, weights: str) -> int:
    """Bytes of the largest rank's share. Embedding, head, router and norms stay in bfloat16; int4 is for experts, routed and shared."""
    return max(
        sum(int(math.prod(rank_shape(p, rank, tp)) * _element_bytes(p, weights)) for p in parameters(config, ()))
        for rank in range(tp)
    )


def _element_bytes(parameter: Parameter, weights: str) -> float:
    quantised = EXPERTS if weights == "int4" else LINEAR
    return WEIGHTS[weights if any(part in parameter.name for part in quantised) else "bfloat16"]


def largest_context(config: ModelConfig, setup: Setup) -> int:
    """Tokens of the longest single request, 0 when the weights leave no room."""
    try:
        return capacity(config, setup).kv.largest_context
    except CapacityError:
        return 0
