"""The kernels of an engine's first steps, compiled before they are captured: a rehearsal of an engine of the same parts names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch

from l4core.attention.select import Selected
from l4core.engine.batch import ScheduledBatch
from l4core.engine.run.fixed_step import StepShape
from l4core.engine.run.runner import Runner
from l4core.engine.speculation.eagle3 import eagle3_without_weights
from l4core.engine.speculation.plan import SpeculationPlan
from l4core.engine.start.compile_ahead import compile_ahead
from l4core.engine.start.rehearsal import (
    NoAttention,
    NoExperts,
    SilentRanks,
    WithoutMemory,
    first_batches,
    one_layer_of_each_kind,
    rehearse,
)
from l4core.engine.start.resolve import chunk_size_of, verified_shapes
from l4core.experts.select import SelectedExperts
from l4core.kv.planner import KVPlan
from l4core.model.llama4 import Layer
from l4core.model.quantised import expert_formats
from l4core.platform import has_triton

if TYPE_CHECKING:
    from l4core.engine.start.build import ModelMaker


def compile_first_kernels(
    make: ModelMaker,
    kernels: Mapping[tuple[str, str], SelectedExperts],
    selected: Selected,
    runner_of: Callable[..., Runner],
    speculation: SpeculationPlan | None,
    shapes: Sequence[StepShape],
    *,
    plan: KVPlan,
    max_tokens: int,
    device: torch.device,
    progress: bool,
) -> str:
    """make: the model, without memory.  kernels: of its experts, by formats.  runner_of: a runner for a model and a backend `selected`.  shapes: that
    will be captured.  max_tokens: of a step. → the line of the report, "" on a device where core has no kernels."""
    if not has_triton(device.type):
        return ""
    batches = list(first_batches(max_tokens, plan.max_running, chunk_size_of(make.config)))
    runners: list[Runner] = []

    def launch(shapes: Sequence[StepShape], batches: Sequence[ScheduledBatch]) -> None:
        with WithoutMemory(device), torch.inference_mode():
            if not runners:
                runners.append(_runner_without_memory(make, kernels, selected, runner_of, plan.max_context))
            rehearse(runners[0], shapes, batches)

    def everything() -> None:
        launch(shapes, batches)
        verified = verified_shapes(shapes)
        if speculation is not None and speculation.draft is not None and verified:
            with WithoutMemory(device), torch.inference_mode():
                eagle3_without_weights(
                    speculation.draft,
                    runners[0],
                    num_drafts=speculation.num_drafts,
                    tree=speculation.tree,
                    max_context=plan.max_context,
                ).rehearse(verified)

    sample = partial(launch, [*shapes[:1], *shapes[-1:]], batches[:1])
    return compile_ahead(sample, everything, make.ranks, device, progress=progress)


def _runner_without_memory(
    make: ModelMaker,
    kernels: Mapping[tuple[str, str], SelectedExperts],
    selected: Selected,
    runner_of: Callable[..., Runner],
    max_positions: int,
) -> Runner:
    """Of the same parts, but for those that may not be given tensors without memory."""
    model = replace(make, ranks=SilentRanks(make.ranks))(max_positions)
    for layer, block in enumerate(model.layers):
        if make.config.moe_layers[layer]:
            chosen = kernels[expert_formats(make.formats, layer)]
            kernel = chosen.kernel if chosen.kernel.without_memory else NoExperts()
            cast(Layer, block).moe.take_kernel(replace(chosen, kernel=kernel))
    backend = selected.backend if selected.backend.without_memory else NoAttention()
    return runner_of(one_layer_of_each_kind(model), selected=replace(selected, backend=backend))
