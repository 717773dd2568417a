"""A chosen kernel against torch's on the model's own weights, at start: a kernel of a vendor whose idea of a weight differs must not serve."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from l4core.errors import BackendUnavailable
from l4core.experts.portable import TorchExperts
from l4core.experts.quantised import TorchQuantisedExperts
from l4core.experts.select import SelectedExperts
from l4core.ops.norm import add_rms_norm_torch
from l4core.plugin_api import ExpertKernel, ExpertWeights

ROWS = 5
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 2e-2}
"""Largest difference, relative to the largest value: several times what rounding does."""
ROUTING_EPS = 1e-5
QUANTISED_TOLERANCE = 0.15
"""Kernels may also quantise activations."""


def prepare_experts(
    selected: SelectedExperts, layers: Sequence[ExpertWeights], weight_format: str, dtype: torch.dtype
) -> None:
    """layers: loaded weights of those that this kernel serves; they are put into its order, and the first is computed once with it and with torch's
    kernel.  dtype: of activations. Raises BackendUnavailable, with the kernel's name, when it raises or its result is not torch's."""
    own = isinstance(selected.kernel, (TorchExperts, TorchQuantisedExperts))
    given = None if own else _tokens(layers[0], dtype)
    twin = TorchExperts() if weight_format == "plain" else TorchQuantisedExperts(weight_format)
    wanted = None if given is None else twin.forward(*given, layers[0]).double()
    who = f"expert kernel {selected.name!r} ({selected.source})"
    fix = f"--expert-kernel {'torch' if weight_format == 'plain' else 'torch_quantised'}"
    try:
        for weights in layers:
            selected.kernel.prepare(weights)
        if given is None or wanted is None:
            return
        found = selected.kernel.forward(*given, layers[0])
        routing_error = _routing_error(selected.kernel, given[0], layers[0].gate_up.shape[0])
    except Exception as failure:
        raise BackendUnavailable(
            f"{who} failed on {ROWS} tokens: {type(failure).__name__}: {failure}", fix=fix
        ) from failure
    if found.shape != wanted.shape or found.dtype != dtype:
        shape, right = list(found.shape), list(wanted.shape)
        raise BackendUnavailable(f"{who} gave {found.dtype} {shape}; wanted {dtype} {right}", fix=fix)
    error = float((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    most = TOLERANCE[dtype] if weight_format == "plain" else QUANTISED_TOLERANCE
    if not routing_error <= TOLERANCE[dtype]:
        raise BackendUnavailable(f"{who}: its norm or router differs from torch's by {routing_error:.2g}", fix=fix)
    if not error <= most:  # NaN too
        raise BackendUnavailable(
            f"{who} differs from torch's by {error:.2g} of the largest value; wanted {most:.2g}", fix=fix
        )


def _routing_error(kernel: ExpertKernel, x: torch.Tensor, num_experts: int) -> float:
    """Of `norm_route`, 0 for a kernel without one: the largest relative difference of the stream, the norm, the score, and of the chosen expert's
    logit to the best one. NaN where something is NaN."""
    weight = torch.linspace(0.5, 1.5, x.shape[1]).to(x)
    router = torch.randn(num_experts, x.shape[1], generator=torch.Generator().manual_seed(1)).to(x) / x.shape[1] ** 0.5
    stream, update = x.clone(), x.flip(0)
    made = kernel.norm_route(stream, update, weight, ROUTING_EPS, router)
    if made is None:
        return 0.0
    normed, expert_ids, score = made
    wanted_stream = x.clone()
    wanted = add_rms_norm_torch(wanted_stream, update, weight, ROUTING_EPS)
    logits = wanted.double() @ router.double().t()
    chosen, best = logits.gather(1, expert_ids.long().unsqueeze(1)).squeeze(1), logits.amax(1)
    pairs = ((stream, wanted_stream), (normed, wanted), (score, best.sigmoid()), (chosen, best))
    return float(
        torch.stack([((a.double() - b.double()).abs() / (1 + b.double().abs())).max() for a, b in pairs]).max()
    )


def _tokens(weights: ExpertWeights, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, expert ids and score: two tokens of one expert, and the first, a middle and the last expert."""
    device, num_experts = weights.gate_up.device, weights.gate_up.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([0, num_experts - 1, 0, num_experts // 2, min(1, num_experts - 1)], dtype=torch.int32)
    x = torch.randn(ROWS, weights.down.shape[-2], generator=generator)  # [E, …, H, …] in every format
    return x.to(device, dtype), ids.to(device), torch.rand(ROWS, generator=generator).to(device)
