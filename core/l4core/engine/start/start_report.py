"""The start-up block: every choice the engine made, one fact a line."""

from __future__ import annotations

from dataclasses import dataclass

from l4core.attention.select import Selected
from l4core.config import EngineConfig
from l4core.engine.start.memory_budget import Budget
from l4core.experts.select import SelectedExperts
from l4core.kv.planner import KVPlan
from l4core.model.config import ModelConfig
from l4core.parallel.ranks import Ranks
from l4core.platform import Platform


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What `build_engine` decided. dtype, kv_dtype, speculation, kernels, graphs, loop: as they are printed.  seconds: until the engine was ready."""

    config: EngineConfig
    model: ModelConfig
    ranks: Ranks
    platform: Platform
    attention: Selected
    experts: SelectedExperts | None
    plan: KVPlan
    budget: Budget
    dtype: str
    kv_dtype: str
    speculation: str
    kernels: str
    graphs: str
    loop: str
    seconds: float


def start_report(made: Choices) -> tuple[str, ...]:
    """The lines, label padded to 16, then the value."""
    sparse = f", {made.model.num_experts} experts in {sum(made.model.moe_layers)}" if any(made.model.moe_layers) else ""
    tokens = " or ".join(f"{name} {count:,}" for name, count in made.plan.num_tokens.items())
    cut = " or ".join(f"{count} {name}" for name, count in made.plan.shape.pages.items())
    device = f"{made.platform.device_type} · {made.platform.device_name or made.platform.arch}" + (
        f" · {made.platform.runtime}" if made.platform.runtime else ""
    )
    lines = [
        (
            "model",
            f"{made.config.model} · {made.model.architecture} · {made.model.num_layers} layers{sparse} · {made.budget.needs.weights / 1e9:.2f} GB",
        ),
        ("device", device),
        *([("ranks", _ranks(made))] if made.ranks.size > 1 else []),
        ("dtype", f"{made.dtype} · KV {made.kv_dtype}"),
        ("attention", made.attention.describe()),
        *([("experts", made.experts.describe())] if made.experts else []),
        (
            "page size",
            f"{made.plan.page_size} tokens · superpage of {cut} pages, {max(made.plan.waste.values()):.1%} waste at most",
        ),
        ("memory", made.budget.text()),
        ("KV tokens", f"{tokens} · {made.plan.bytes_total / 1e9:.2f} GB"),
        ("largest context", f"{made.plan.max_context:,} tokens"),
        ("speculation", made.speculation),
        ("prefix cache", "off (--disable-radix-cache)" if made.config.disable_radix_cache else "on"),
        *([("kernels", made.kernels)] if made.kernels else []),
        ("graphs", made.graphs),
        ("loop", made.loop),
        ("loaded in", f"{made.seconds:.1f} s"),
    ]
    if made.config.disable_hybrid_swa_memory:
        lines.append(("local KV", "kept until a request ends (--disable-hybrid-swa-memory)"))
    if made.config.trust_remote_code:
        lines.append(("trust", "--trust-remote-code is accepted; code from a checkpoint is never executed"))
    return tuple(f"{label:<16}{value}" for label, value in lines)


def _ranks(made: Choices) -> str:
    dealt = f", experts dealt out to {made.config.ep} groups" if made.config.ep > 1 else ""
    return f"{made.ranks.size} compute the model together{dealt} · weights and memory are of rank {made.ranks.rank}"
