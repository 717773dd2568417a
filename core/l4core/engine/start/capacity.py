"""What a model would hold on some device, before anyone rents it: the arithmetic of start-up on numbers alone. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from l4core.engine.start.memory_budget import RUNTIME_BYTES, Budget, share_out
from l4core.engine.start.step_memory import needs_of
from l4core.errors import ConfigError
from l4core.kv.planner import Footprint, KVPlan, plan_kv
from l4core.model.config import ModelConfig
from l4core.model.layout import Parameter, parameters
from l4core.model.slicing import check_groups, check_world, rank_config, rank_shape
from l4core.quant.formats import ONLINE, PLAIN, bytes_in, format_of, stored_bytes

if TYPE_CHECKING:
    from l4core.engine.speculation.draft_model import DraftModel
    from l4core.engine.speculation.plan import SpeculationPlan

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """gib: memory as torch reports it.  platform: what `l4 backends --platform` calls it."""

    gib: float
    platform: str


DEVICES: Mapping[str, Device] = {
    "L4-24GB": Device(22.0, "sm89"),
    "A100-40GB": Device(39.4, "sm80"),
    "A100-80GB": Device(79.1, "sm80"),
    "H100-80GB": Device(79.1, "sm90"),
    "H200": Device(139.8, "sm90"),
    "B200": Device(178.0, "sm100"),
    "MI300X": Device(191.5, "gfx942"),
    "MI355X": Device(287.5, "gfx950"),
}
"""GiB of H100, H200 and B200 as they were seen, of the others what is sold, less up to two. `--memory` takes any number."""
ITEM_BYTES = 2
"""Of an element that is computed with: bfloat16."""
PRESETS = ("scout", "maverick")
WEIGHTS = ("bfloat16", *ONLINE)
LENGTHS = (1_000, 8_000, 32_000, 128_000, 1_000_000)
RATIOS = (1.0, 0.8, 0.1, 0.01)
"""Of local to global tokens, as pools that are split at start-up need one; 0.8 is SGLang's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is asked. memory_bytes: of one device.  tp: devices; ep: groups of them that the experts are dealt out to.
    weights: one of WEIGHTS.  formats: by parameter, of a checkpoint that is quantised already.
    kv_bytes: of one stored element.  fraction: None = the default.
    local_ratio: cap on local KV (kv.planner.local_cap).  hybrid: local pages of finished chunks are dropped.
    workspace: of the attention backend, bytes.  num_tokens: computed in one step at most.  graphs: tokens of each captured step.
    speculation: as the engine plans it.  lengths: of which requests are counted, tokens."""

    memory_bytes: int
    tp: int = 1
    ep: int = 1
    weights: str = "bfloat16"
    formats: Mapping[str, str] | None = None
    kv_bytes: int = 2
    page_size: int = 64
    context_length: int | None = None
    max_running: int = 256
    num_tokens: int = 8192
    fraction: float | None = None
    local_ratio: float | None = None
    hybrid: bool = True
    workspace: int = 0
    graphs: Sequence[int] = ()
    speculation: SpeculationPlan | None = None
    lengths: Sequence[int] = LENGTHS

    @property
    def draft(self) -> DraftModel | None:
        """Of EAGLE3."""
        return None if self.speculation is None else self.speculation.draft


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What fits, on each of `setup.tp` devices. draft_bytes: of the budget's weights.  at_once: (tokens of one request, requests of that length
    together).  group_bytes: KV group name → bytes of one token's keys and values in it."""

    setup: Setup
    budget: Budget
    draft_bytes: int
    kv: KVPlan
    at_once: Sequence[tuple[int, int]]
    group_bytes: Mapping[str, int]

    def json(self) -> dict[str, object]:
        needs = self.budget.needs
        return {
            "tp": self.setup.tp,
            "ep": self.setup.ep,
            "memory_bytes": self.setup.memory_bytes,
            "weight_bytes": needs.weights,
            "draft_bytes": self.draft_bytes,
            "workspace_bytes": needs.workspace,
            "step_bytes": needs.step,
            "table_bytes": needs.tables,
            "graph_bytes": needs.graphs,
            "runtime_bytes": RUNTIME_BYTES,
            "kv_bytes": self.budget.kv,
            "mem_fraction_static": round(self.budget.fraction, 4),
            "page_size": self.kv.page_size,
            "token_bytes": dict(self.group_bytes),
            "superpage": dict(self.kv.shape.pages),
            "superpage_bytes": self.kv.superpage_bytes,
            "waste": dict(self.kv.waste),
            "max_context": self.kv.largest_context,
            "requests_at_once": {str(length): count for length, count in self.at_once},
            "max_context_if_split": {str(ratio): self.if_split(ratio) for ratio in RATIOS},
        }

    def if_split(self, ratio: float) -> int:
        """Largest context, were the same bytes split at start-up into `ratio` local tokens for each global one (SGLang 0.5.23's arithmetic; 1 is
        what every layer keeping every token gives)."""
        cell = self.group_bytes.get("global", 0) + ratio * self.group_bytes.get("local", 0)
        page = self.kv.page_size
        return int(self.budget.kv / cell) // page * page


def load_config(model: str, *, option: str = "--model") -> ModelConfig:
    """A preset by name, or a folder. ConfigError, naming `option`, for what is neither; CheckpointError for a folder whose config cannot be used."""
    if model in PRESETS:
        text = (files("l4core.model") / "presets" / f"{model}.json").read_text()
        return ModelConfig.from_dict(json.loads(text))
    if not Path(model).is_dir():
        raise ConfigError(f"{option} is {model!r}; wanted a folder, {' or '.join(PRESETS)}", fix=f"{option} scout")
    return ModelConfig.from_folder(Path(model))


def capacity(config: ModelConfig, setup: Setup) -> Capacity:
    """Raises ConfigError for a tp or page size that does not divide, CapacityError when weights or context do not fit; it names what would."""
    rank = rank_config(config, setup.tp)
    num_tokens = max(setup.num_tokens, setup.max_running)
    draft_bytes, workspace = 0, setup.workspace
    if setup.draft is not None:
        draft_bytes = ITEM_BYTES * setup.draft.elements_on(setup.tp)
        workspace += ITEM_BYTES * num_tokens * setup.draft.elements_a_token(setup.tp)
    needs = needs_of(
        rank,
        weights=rank_weight_bytes(config, setup.tp, setup.weights, setup.formats, setup.ep) + draft_bytes,
        workspace=workspace,
        num_tokens=num_tokens,
        max_running=setup.max_running,
        context_length=setup.context_length,
        page_size=setup.page_size,
        itemsize=ITEM_BYTES,
        device_bytes=setup.memory_bytes,
        graph_batches=setup.graphs,
        num_drafts=0 if setup.speculation is None else setup.speculation.num_drafts,
    )
    budget = share_out(setup.memory_bytes, needs, setup.fraction)
    groups = rank.kv_groups(num_draft_layers=0 if setup.draft is None else 1, hybrid=setup.hybrid)
    kv = plan_kv(
        groups,
        page_size=setup.page_size,
        num_kv_heads=rank.num_kv_heads,
        head_dim=rank.head_dim,
        bytes_per_element=setup.kv_bytes,
        budget_bytes=budget.kv,
        context_length=setup.context_length,
        model_limit=config.max_position_embeddings,
        max_running=setup.max_running,
        max_total_tokens=None,
        local_ratio=setup.local_ratio,
    )
    footprint = Footprint(groups=groups, shape=kv.shape, page_size=kv.page_size, max_local=kv.max_local)
    usable = budget.kv // kv.superpage_bytes - 1
    layer = 2 * rank.num_kv_heads * rank.head_dim * setup.kv_bytes
    return Capacity(
        setup=setup,
        budget=budget,
        draft_bytes=draft_bytes,
        kv=kv,
        at_once=[(n, footprint.at_once(usable, n)) for n in setup.lengths if n <= kv.largest_context],
        group_bytes={group.name: layer * len(group.layer_ids) for group in groups},
    )


def rank_weight_bytes(
    config: ModelConfig, tp: int, weights: str, formats: Mapping[str, str] | None = None, ep: int = 1
) -> int:
    """Bytes of the largest rank's share. weights: one of WEIGHTS; what each takes says quant.formats.  formats: those of a checkpoint that is
    quantised already, by parameter, in place of that.  ep: as Setup has it."""
    check_world(config, tp, ep)
    quantization = None if weights == "bfloat16" else weights
    of = list(parameters(config, ()))
    kept = {p.name: format_of(p.name, quantization) if formats is None else formats.get(p.name, PLAIN) for p in of}
    check_groups(of, kept, tp, ep)
    return max(sum(bytes_in(kept[p.name], rank_shape(p, rank, tp, ep)) for p in of) for rank in range(tp))


def element_bytes(parameter: Parameter, weights: str) -> float:
    """Bytes of one element, its share of the scales included. weights: one of WEIGHTS."""
    kept = None if weights == "bfloat16" else weights
    return stored_bytes(parameter.name, parameter.shape, kept) / math.prod(parameter.shape)
