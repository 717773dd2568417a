"""What the engine will be, from a config, a model's config and this machine: every choice, before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from l4core.attention.select import Selected, select_backend
from l4core.config import EngineConfig
from l4core.engine.key_values import parse_key_values
from l4core.engine.run.fixed_step import StepShape
from l4core.engine.speculation.plan import SpeculationPlan
from l4core.engine.start.graph_sizes import FINE, GraphSizes, graph_sizes
from l4core.engine.start.memory_budget import Budget, Needs
from l4core.engine.start.step_memory import needs_of
from l4core.errors import ConfigError
from l4core.experts.select import SelectedExperts, select_experts
from l4core.kv.blocks import KVGroup
from l4core.kv.dtypes import stored_scale
from l4core.kv.planner import KVPlan, plan_kv, ratio_cost
from l4core.model.config import ModelConfig
from l4core.model.kv_scales import read_kv_scales
from l4core.model.quantised import Formats, expert_formats
from l4core.model.slicing import expert_share
from l4core.parallel.ranks import ALONE, Ranks
from l4core.platform import Platform, copies_ahead
from l4core.plugin_api import AttentionRequirements, ExpertRequirements
from l4core.plugin_manager import Plugins
from l4core.quant.formats import PLAIN

logger = logging.getLogger(__name__)

LARGEST_VERIFIED = 32
"""Sequences of a verify step that gets a graph; in larger batches its rows touch every expert anyway, and launches are small beside it."""


def named_device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device is {name!r}; torch knows no such device", fix="--device auto") from error


def choose_dtype(asked: str, checkpoint: str, platform: Platform) -> torch.dtype:
    """auto: the checkpoint's dtype, but float32 on a CPU without bfloat16 instructions, where emulation is slower than twice the bytes."""
    if asked != "auto":
        return torch_dtype(asked)
    if platform.device_type == "cpu" and checkpoint != "float32" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch_dtype(checkpoint)


def requirements(
    config: EngineConfig,
    model: ModelConfig,
    *,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    num_drafts: int = 0,
    trees: bool = False,
) -> AttentionRequirements:
    """What this model under these flags asks of an attention backend, on one rank. num_drafts: guesses verified per sequence and step."""
    return AttentionRequirements(
        num_q_heads=model.num_q_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        q_dtype=dtype_name(q_dtype),
        kv_dtype=dtype_name(kv_dtype),
        page_size=config.page_size,
        chunk_size=chunk_size_of(model),
        max_num_seqs=config.max_running_requests * (num_drafts + 1),
        max_num_tokens=max(config.chunked_prefill_size, config.max_running_requests),
        num_draft_tokens=num_drafts,
        needs_tree=trees,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 → "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def select_attention(
    config: EngineConfig,
    model: ModelConfig,
    platform: Platform,
    plugins: Plugins,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    speculation: SpeculationPlan | None,
) -> Selected:
    num_drafts = 0 if speculation is None else speculation.num_drafts
    device = platform.device_type if config.device == "auto" else config.device
    return select_backend(
        plugins,
        platform,
        requirements(
            config,
            model,
            q_dtype=dtype,
            kv_dtype=kv_dtype,
            num_drafts=num_drafts,
            trees=speculation is not None and speculation.trees,
        ),
        named=config.attention_backend,
        options=parse_key_values("--attention-option", config.attention_option),
        device=device,
    )


def expert_requirements(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    routed: str = PLAIN,
    shared: str = PLAIN,
    ranks: Ranks = ALONE,
) -> ExpertRequirements:
    """What this model under these flags asks of an expert kernel, on one rank. model: the whole one.  routed, shared: formats of the weights."""
    held = expert_share(model.num_experts, ranks.rank, ranks.size, config.ep)
    return ExpertRequirements(
        num_experts=held.count,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size // held.world,
        dtype=dtype_name(dtype),
        weight_format=routed,
        shared_format=shared if shared == routed and held.world == ranks.size else None,
        max_num_tokens=max(config.chunked_prefill_size, config.max_running_requests),
    )


def choose_experts(
    config: EngineConfig,
    model: ModelConfig,
    platform: Platform,
    plugins: Plugins,
    dtype: torch.dtype,
    formats: Formats,
    ranks: Ranks = ALONE,
) -> Mapping[tuple[str, str], SelectedExperts]:
    """(format of the routed experts, of the shared one) → kernel; one in all checkpoints but those that quantise some layers only."""
    device = platform.device_type if config.device == "auto" else config.device
    found: dict[tuple[str, str], SelectedExperts] = {}
    for layer, sparse in enumerate(model.moe_layers):
        pair = expert_formats(formats, layer)
        if sparse and pair not in found:
            req = expert_requirements(config, model, dtype, *pair, ranks)
            found[pair] = select_experts(plugins, platform, req, named=config.expert_kernel, device=device)
    return found


def memory_needs(
    config: EngineConfig,
    model: ModelConfig,
    platform: Platform,
    selected: Selected,
    experts: SelectedExperts | None,
    dtype: torch.dtype,
    weight_bytes: int,
    graphs: GraphSizes,
    speculation: SpeculationPlan | None,
) -> Needs:
    num_tokens = max(config.chunked_prefill_size, config.max_running_requests)
    workspace = selected.verdict.workspace_bytes + (experts.verdict.workspace_bytes if experts else 0)
    if speculation is not None and speculation.draft is not None:
        workspace += num_tokens * speculation.draft.elements_a_token(config.tp) * dtype.itemsize
    return needs_of(
        model,
        weights=weight_bytes,
        workspace=workspace,
        num_tokens=num_tokens,
        max_running=config.max_running_requests,
        context_length=config.context_length,
        page_size=selected.page_size,
        itemsize=dtype.itemsize,
        device_bytes=platform.memory_bytes,
        graph_batches=[shape.num_seqs * shape.num_tokens for shape in graph_shapes(graphs, speculation)],
        num_drafts=0 if speculation is None else speculation.num_drafts,
    )


def sizes_of_graphs(
    config: EngineConfig, platform: Platform, selected: Selected, experts: Iterable[SelectedExperts]
) -> GraphSizes:
    sizes = graph_sizes(
        platform,
        selected.verdict,
        backend=selected.entry.name,
        disabled=config.disable_cuda_graph,
        largest=config.cuda_graph_max_bs,
        max_running=config.max_running_requests,
    )
    eager = [kernel.name for kernel in experts if not kernel.verdict.graph]
    if sizes.sizes and eager:
        return GraphSizes(off=f"the expert kernel {eager[0]} declares none: l4 backends --experts names others")
    return sizes


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    groups: Sequence[KVGroup],
    budget: Budget,
    selected: Selected,
    kv_dtype: torch.dtype,
) -> KVPlan:
    plan = plan_kv(
        groups,
        page_size=selected.page_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        bytes_per_element=kv_dtype.itemsize,
        budget_bytes=budget.kv,
        context_length=config.context_length,
        model_limit=model.max_position_embeddings,
        max_running=config.max_running_requests,
        max_total_tokens=config.max_total_tokens,
        local_ratio=config.swa_full_tokens_ratio,
    )
    if cost := ratio_cost(plan, groups):
        logger.warning(cost)
    return plan


def kv_scales(
    config: EngineConfig, model: ModelConfig, folder: Path, kv_dtype: torch.dtype
) -> Mapping[int, tuple[float, float]]:
    """Of fp8 KV, layer → (k, v) from the checkpoint; where it has none, values are stored as they are."""
    if kv_dtype.itemsize > 1 or config.load_format == "dummy":
        return {}
    found = read_kv_scales(folder, model)
    name = dtype_name(kv_dtype)
    return {layer: (stored_scale(k, name), stored_scale(v, name)) for layer, (k, v) in found.items()}


def kv_groups(config: EngineConfig, model: ModelConfig, *, num_draft_layers: int = 0) -> tuple[KVGroup, ...]:
    """The groups that planner, memory, scheduler and runner share."""
    return model.kv_groups(hybrid=not config.disable_hybrid_swa_memory, num_draft_layers=num_draft_layers)


def choose_loop(config: EngineConfig, device: torch.device, speculation: SpeculationPlan | None) -> str:
    """Which loop steps the engine, and why it is not the overlapped one."""
    if config.disable_overlap_schedule:
        return "simple (--disable-overlap-schedule)"
    if not copies_ahead(device.type):
        return f"simple (on device {device.type} nothing runs beside the host)"
    return (
        "overlapped"
        if speculation is None
        else "overlapped, a relay while guesses are made (they follow from the last tokens)"
    )


def chunk_size_of(model: ModelConfig) -> int | None:
    """Tokens of a chunk of the local layers; None without such layers."""
    return model.attention_chunk_size if any(model.chunked_layers) else None


def verified_shapes(shapes: Sequence[StepShape]) -> list[StepShape]:
    """Those whose rows a draft on the device reads, in a graph too."""
    return [s for s in shapes if s.num_seqs <= LARGEST_VERIFIED]


def graph_shapes(graphs: GraphSizes, speculation: SpeculationPlan | None) -> list[StepShape]:
    """Decodes of every size, and drafts where they may pay: of full length for batches of up to LARGEST_VERIFIED, shorter ones of the smallest."""
    shapes = [StepShape(size, 1) for size in graphs.sizes]
    if speculation is not None:
        full = speculation.num_levels + 1
        shapes += [StepShape(size, full) for size in graphs.sizes if size <= LARGEST_VERIFIED]
        shapes += [StepShape(size, n) for size in graphs.sizes if size <= FINE[-1] for n in range(2, full)]
    return shapes
