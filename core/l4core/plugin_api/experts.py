"""Kernels for the mixture of experts: what is asked of one, its verdict and entry, the weights it is given and what it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from l4core.platform import Platform
from l4core.plugin_api.verdict import Tier, Unusable

if TYPE_CHECKING:
    import logging

    import torch

__all__ = [
    "ExpertContext",
    "ExpertKernel",
    "ExpertKernelEntry",
    "ExpertRequirements",
    "ExpertVerdict",
    "ExpertWeights",
    "ExpertsUsable",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRequirements:
    """What the mixture-of-experts layers of this model, on this rank, under these flags, need. One expert a token, and a shared one.

    num_experts: routed ones on this rank.  hidden_size: H.  intermediate_size: I of one expert on this rank, the shared one's too.
    dtype: torch's name of the compute dtype.  weight_format: how routed weights are kept, one of the names in `ExpertWeights`.
    shared_format: the shared expert's, None when the kernel is not given it (the layer then adds it by itself).
    max_num_tokens: rows of one call at most.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: str
    weight_format: str = "plain"
    shared_format: str | None = "plain"
    max_num_tokens: int = 1
    needs_graph: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsUsable:
    """Verdict: the kernel can do all that was required. graph: it may be captured, so it reads nothing back to the host.
    workspace_bytes: device memory it holds for life, plus the most one call takes beside x and the result.
    named_only: never chosen by itself, whatever its tier; `note` says why.
    skips: `forward` takes an id of −1, of a token whose expert another rank holds, gives 0 for it and reads no weight. To other kernels core gives
    some id and a score of 0, with which any expert's result is 0."""

    tier: Tier
    graph: bool = False
    workspace_bytes: int = 0
    named_only: bool = False
    skips: bool = False
    provider: str = ""
    note: str = ""


ExpertVerdict: TypeAlias = ExpertsUsable | Unusable


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One layer's experts, each weight out by in: a row of a matrix makes one output. gate rows come first, then up. Last stride 1.

    format       gate_up, down                                        gate_up_scale, down_scale
    plain        [E, 2I, H], [E, H, I] of the compute dtype           None
    fp8_channel  the same, float8_e4m3fn                              float32 [E, 2I, 1], [E, H, 1]: of an output row
    int4_g128    int16 [E, ⌈H/128⌉, 2I, 32], [E, ⌈I/128⌉, H, 32]:     bfloat16 [E, ⌈H/128⌉, 2I], [E, ⌈I/128⌉, H]: of 128 inputs
                 nibble q of word j of group g is the value + 8 of
                 input 128·g + 32·q + j

    shared_*: the shared expert's, the same without E; all None when the layer adds it by itself.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None
    shared_gate_up: torch.Tensor | None = None
    shared_down: torch.Tensor | None = None
    shared_gate_up_scale: torch.Tensor | None = None
    shared_down_scale: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertContext:
    """Handed to `create`. device: torch device string."""

    requirements: ExpertRequirements
    platform: Platform
    device: str
    logger: logging.Logger


class ExpertKernel(ABC):
    """out = down_e(silu(s · gate_e(x)) · (s · up_e(x))) + down(silu(gate(x)) · up(x)), the second term for the shared expert where given.

    One object serves all layers of a model and keeps nothing of a call. A row's result may depend on the number of rows, never on their values.
    without_memory: as AttentionBackend has it, of `forward`.
    """

    without_memory: ClassVar[bool] = False

    def prepare(self, weights: ExpertWeights) -> None:  # noqa: B027  (most kernels read weights as they are loaded)
        """Called once for each layer when its weights are loaded, before the first `forward`: a kernel that reads another order writes it over the
        given tensors."""

    @abstractmethod
    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        """x [T, H], rows contiguous; expert_ids int32 [T] in [0, E), and −1 where the verdict has `skips`; score [T], float32 or wider: s, which
        scales what the routed expert reads.
        → [T, H] in x's dtype; it may be a transposed view and may be changed by the caller. T ≥ 1."""

    def norm_route(
        self, stream: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float, router: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """What stands ahead of the experts, for a kernel that does it in one pass; None: core does it.

        Adds update [T, H] to stream [T, H] in place. → (its RMS norm · weight [H], of which x will be made; expert_ids int32 [T], the arg-max of
        that · router [E, H]ᵀ, the lowest of several; score [T], the sigmoid of that logit in float32). On one of several ranks E counts all experts.
        """
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertKernelEntry:
    """What `l4_expert_kernels` returns. probe: pure function of plain data (no torch import, opens no device).
    create: "package.module:function", imported only when chosen; called with an ExpertContext; returns an ExpertKernel or raises
    BackendUnavailable. Chosen by `--expert-kernel NAME`, else by tier."""

    name: str
    api: int
    probe: Callable[[Platform, ExpertRequirements], ExpertVerdict]
    create: str
