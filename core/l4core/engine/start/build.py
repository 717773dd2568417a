"""From a config to a running engine: resolve, read, choose, load, size, wire. Every choice it makes is a line of the start-up report."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch

from l4core.attention.select import Selected
from l4core.config import EngineConfig
from l4core.engine.engine import Engine
from l4core.engine.run.fixed_step import StepShape
from l4core.engine.run.runner import Runner
from l4core.engine.schedule.scheduler import Scheduler, SchedulerLimits
from l4core.engine.speculation.draft_pace import DraftPace
from l4core.engine.speculation.eagle3 import Eagle3Speculation
from l4core.engine.speculation.plan import SpeculationPlan, create_pace, create_speculation, plan_speculation
from l4core.engine.start.first_kernels import compile_first_kernels
from l4core.engine.start.graph_sizes import GraphSizes
from l4core.engine.start.memory_budget import Budget, device_budget
from l4core.engine.start.resolve import (
    choose_dtype,
    choose_experts,
    choose_loop,
    chunk_size_of,
    dtype_name,
    graph_shapes,
    kv_groups,
    kv_scales,
    memory_needs,
    named_device,
    plan_memory,
    select_attention,
    sizes_of_graphs,
    torch_dtype,
    verified_shapes,
)
from l4core.engine.start.samplers import sampling_pipeline
from l4core.engine.start.start_report import Choices, start_report
from l4core.engine.start.weight_formats import weight_formats
from l4core.errors import ConfigError
from l4core.experts.select import SelectedExperts
from l4core.experts.smoke import prepare_experts
from l4core.kv.blocks import KVGroup
from l4core.kv.dtypes import kv_dtype_name
from l4core.kv.manager import KVManager
from l4core.kv.memory import KVMemory
from l4core.kv.planner import KVPlan
from l4core.model.config import ModelConfig
from l4core.model.layout import ROUTED, parameters
from l4core.model.llama4 import Layer, Llama4
from l4core.model.quantised import Formats, exchange_layers, expert_formats
from l4core.model.repository import resolve_model
from l4core.model.slicing import check_groups, rank_config
from l4core.model.step_heap import keep_step_memory
from l4core.model.weights import fill_dummy, load_weights
from l4core.parallel.agree import check_sums, least
from l4core.parallel.ranks import ALONE, Ranks
from l4core.platform import detect
from l4core.plugin_manager import Plugins, load_plugins
from l4core.sampling.pipeline import SamplingPipeline

logger = logging.getLogger(__name__)

DRAFT_FLOOR = 0.05
"""A request whose first guesses are right less often is given no more; half of what is known of it comes from the last 34 drafts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine and what its user should know. report: lines of the start-up block, in order.  budget: what it holds of the device.
    drafts: decides how much to guess, for the loop that steps the engine; None = always the same."""

    engine: Engine
    report: tuple[str, ...]
    model_config: ModelConfig
    folder: Path
    plugins: Plugins
    context_length: int
    budget: Budget
    drafts: DraftPace | None = None


def build_engine(
    config: EngineConfig,
    *,
    ranks: Ranks = ALONE,
    progress: bool = True,
    model_config: ModelConfig | None = None,
) -> BuiltEngine:
    """Raises ConfigError, CheckpointError, CapacityError, BackendUnavailable or PluginError; each names its fix.

    ranks: those that compute the model together. Each has an engine of its own on its own device, and all are given the same inboxes.
    model_config: for benchmarks of shapes that no folder holds (model.slicing.rank_config); weights are then dummy ones.
    """
    began = time.perf_counter()
    progress = progress and ranks.rank == 0
    if config.tp != ranks.size:
        raise ConfigError(f"--tp is {config.tp}, and {ranks.size} ranks are here", fix=f"--tp {ranks.size}")
    if model_config is not None and config.load_format != "dummy":
        raise ConfigError("a model without a folder has dummy weights only", fix="--load-format dummy")
    folder = resolve_model(config) if model_config is None else Path()
    model_config = model_config or ModelConfig.from_folder(folder)
    named = None if config.device == "auto" else named_device(config.device)
    platform = detect(config.device)
    device = named or torch.device(platform.device_type)
    rank = rank_config(model_config, ranks.size)
    dtype = choose_dtype(config.dtype, model_config.dtype, platform)
    kv_dtype = torch_dtype(kv_dtype_name(config.kv_cache_dtype, dtype_name(dtype), platform.arch))
    plugins = load_plugins()
    speculation = plan_speculation(config, plugins, model_config)
    selected = select_attention(config, rank, platform, plugins, dtype, kv_dtype, speculation)
    formats = weight_formats(config, model_config, folder)
    check_groups(parameters(model_config, ()), formats, ranks.size, config.ep)
    check_sums(ranks, model_config.hidden_size, dtype, device)
    kernels = choose_experts(config, model_config, platform, plugins, dtype, formats, ranks)
    experts = next(iter(kernels.values()), None)
    make = ModelMaker(config=model_config, dtype=dtype, formats=formats, ranks=ranks, ep=config.ep)
    sizes = {name: p.nbytes for name, p in make(1).named_parameters()}
    weight_bytes, routed_bytes = sum(sizes.values()), sum(size for name, size in sizes.items() if ROUTED in name)
    draft = None if speculation is None else speculation.draft
    if draft is not None:
        weight_bytes += draft.elements_on(ranks.size) * dtype.itemsize
    graphs = sizes_of_graphs(config, platform, selected, kernels.values())
    needs = memory_needs(config, rank, platform, selected, experts, dtype, weight_bytes, graphs, speculation)
    budget = device_budget(platform, needs, config.mem_fraction_static, sharing=ranks.size)
    budget = replace(budget, kv=least(ranks, budget.kv, device))
    groups = kv_groups(config, model_config, num_draft_layers=int(draft is not None))
    plan = plan_memory(config, rank, groups, budget, selected, kv_dtype)
    budget = replace(budget, kv=plan.bytes_total)
    aux_layers = () if draft is None else draft.config.aux_layers
    model = _load_model(config, make, folder, device, plan.max_context, progress, kernels, aux_layers)
    scales = kv_scales(config, model_config, folder, kv_dtype)
    pipeline = sampling_pipeline(config, plugins, model_config.vocab_size)
    runner_of = partial(
        _make_runner,
        config,
        groups,
        plan=plan,
        selected=selected,
        pipeline=pipeline,
        device=device,
        kv_dtype=kv_dtype,
        scales=scales,
        speculation=speculation,
    )
    engine = _wire(config, model_config, groups, runner_of(model), plan, device, speculation)
    if device.type == "cpu":
        keep_step_memory(budget.needs.step)
    bar = progress and sys.stderr.isatty()
    shapes = _captured_shapes(graphs, speculation, plan.max_running)
    compiled = compile_first_kernels(
        make,
        kernels,
        selected,
        runner_of,
        speculation,
        shapes,
        plan=plan,
        max_tokens=config.chunked_prefill_size,
        device=device,
        progress=bar,
    )
    captured = _capture(engine, graphs, shapes, progress=bar)
    report = start_report(
        Choices(
            config=config,
            model=model_config,
            ranks=ranks,
            platform=platform,
            attention=selected,
            experts=experts,
            plan=plan,
            budget=budget,
            dtype=dtype_name(dtype),
            kv_dtype=dtype_name(kv_dtype) + _scales_text(kv_dtype, scales),
            speculation="off" if speculation is None else speculation.describe(),
            kernels=compiled,
            graphs=captured,
            loop=choose_loop(config, device, speculation),
            seconds=time.perf_counter() - began,
        )
    )
    return BuiltEngine(
        engine=engine,
        report=report,
        model_config=model_config,
        folder=folder,
        plugins=plugins,
        context_length=plan.max_context,
        budget=budget,
        drafts=create_pace(
            speculation, config, rank, weight_bytes, routed_bytes, dtype.itemsize, max_running=plan.max_running
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMaker:
    """What a model is made of before it has memory. config: of the whole model; the one made is this rank's share."""

    config: ModelConfig
    dtype: torch.dtype
    formats: Formats
    ranks: Ranks = ALONE
    ep: int = 1

    def __call__(self, max_positions: int) -> Llama4:
        """On the meta device."""
        with torch.device("meta"):
            model = Llama4(self.config, max_positions=max_positions, ranks=self.ranks, ep=self.ep)
            return exchange_layers(model.to(self.dtype), self.formats)


def _load_model(
    config: EngineConfig,
    make: ModelMaker,
    folder: Path,
    device: torch.device,
    max_positions: int,
    progress: bool,
    kernels: Mapping[tuple[str, str], SelectedExperts],
    aux_layers: tuple[int, ...],
) -> Llama4:
    """The model with its weights on the device; they are written straight into place, so there is never a second copy."""
    model_config, formats, ranks = make.config, make.formats, make.ranks
    model = make(max_positions).to_empty(device=device).requires_grad_(False).eval()
    model.aux_layers = aux_layers
    for layer, block in enumerate(model.layers):
        if model_config.moe_layers[layer]:
            cast(Layer, block).moe.take_kernel(kernels[expert_formats(formats, layer)])
    parameters = dict(model.named_parameters())
    if config.load_format == "dummy":
        fill_dummy(parameters, config.random_seed, ranks.rank)
    else:
        bar = progress and sys.stderr.isatty()
        load_weights(parameters, folder, model_config, ranks=ranks, ep=make.ep, progress=bar, formats=formats)
    del parameters  # packing lets plain weights go
    _prepare_experts(model, model_config, formats, kernels)
    model.pack()
    return model


def _prepare_experts(
    model: Llama4, config: ModelConfig, formats: Formats, kernels: Mapping[tuple[str, str], SelectedExperts]
) -> None:
    """Weights into each kernel's order, and a check of what it makes of them."""
    blocks = [cast(Layer, block) for block in model.layers]
    for pair, selected in kernels.items():
        mine = [
            block.moe
            for layer, block in enumerate(blocks)
            if config.moe_layers[layer] and expert_formats(formats, layer) == pair
        ]
        prepare_experts(selected, [moe.weights() for moe in mine], pair[0], mine[0].router.weight.dtype)


def _make_runner(
    config: EngineConfig,
    groups: Sequence[KVGroup],
    model: Llama4,
    plan: KVPlan,
    selected: Selected,
    pipeline: SamplingPipeline,
    device: torch.device,
    kv_dtype: torch.dtype,
    scales: Mapping[int, tuple[float, float]],
    speculation: SpeculationPlan | None,
) -> Runner:
    """With its memory for keys and values."""
    memory = KVMemory(
        groups,
        plan,
        num_kv_heads=rank_config(model.config, model.ranks.size).num_kv_heads,
        head_dim=model.config.head_dim,
        dtype=kv_dtype,
        device=device,
        dense=selected.verdict.page_stride == "dense",
        clear=selected.verdict.finite_tail,
        scales=scales,
    )
    return Runner(
        model,
        memory,
        selected.backend,
        pipeline,
        groups=groups,
        page_size=plan.page_size,
        max_running=plan.max_running,
        max_context=plan.max_context,
        device=device,
        native_chunk=selected.verdict.native_chunk,
        empty_rows=selected.verdict.empty_rows,
        max_drafts=0 if speculation is None else speculation.num_levels,
    )


def _wire(
    config: EngineConfig,
    model_config: ModelConfig,
    groups: Sequence[KVGroup],
    runner: Runner,
    plan: KVPlan,
    device: torch.device,
    speculation: SpeculationPlan | None,
) -> Engine:
    limits = SchedulerLimits(
        max_running=plan.max_running,
        max_tokens_per_step=config.chunked_prefill_size,
        chunk_size=chunk_size_of(model_config),
        max_context=plan.max_context,
        draft_floor=DRAFT_FLOOR if config.speculative_adaptive == "on" else 0.0,
    )
    kv = KVManager(
        groups,
        plan.page_size,
        plan.num_superpages,
        prefix_cache=not config.disable_radix_cache,
        num_ahead=int(speculation is not None and speculation.draft is not None),
        max_local=plan.max_local,
    )
    drafter = None
    if speculation is not None:
        drafter = create_speculation(speculation, config, runner, max_context=plan.max_context, device=str(device))
    return Engine(
        Scheduler(limits, kv),
        runner,
        drafter,
        overlap=choose_loop(config, device, speculation).startswith("overlapped"),
    )


def _scales_text(kv_dtype: torch.dtype, scales: Mapping[int, tuple[float, float]]) -> str:
    if kv_dtype.itemsize > 1:
        return ""
    return f", scales of {len(scales)} layers from the checkpoint" if scales else ", scale 1 (the checkpoint has none)"


def _captured_shapes(graphs: GraphSizes, speculation: SpeculationPlan | None, max_running: int) -> list[StepShape]:
    """Smallest first."""
    wanted = graph_shapes(graphs, speculation)
    return sorted({StepShape(min(s.num_seqs, max_running), s.num_tokens) for s in wanted})


def _capture(engine: Engine, graphs: GraphSizes, shapes: Sequence[StepShape], *, progress: bool) -> str:
    """Captures what there is to capture → the line of the report."""
    runner, drafter = engine.runner, engine.speculation
    if not shapes:
        return f"off ({graphs.off})"
    made = runner.capture(shapes, progress=progress)
    if isinstance(drafter, Eagle3Speculation):
        drafter.capture(verified_shapes(shapes), progress=progress)
    verifies = [s.num_seqs for s in shapes if s.num_tokens > 1]
    drafts = f" and {len(verifies)} of up to {verifies[-1]} drafts" if verifies else ""
    decodes = f"{len(shapes) - len(verifies)} batches of up to {shapes[-1].num_seqs} decodes"
    return f"{decodes}{drafts} · {made.num_bytes / 1e9:.2f} GB · {made.seconds:.1f} s"
