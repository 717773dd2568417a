"""Mixture of experts with one expert a token: a router, the expert it chose, and a shared expert that every token visits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from l4core.experts.packed import PackedExperts
from l4core.experts.portable import TorchExperts
from l4core.experts.select import SelectedExperts
from l4core.model.config import ModelConfig
from l4core.model.layers import Linear, SwiGLU, parameter
from l4core.model.slicing import expert_share
from l4core.ops.norm_route import norm_route
from l4core.ops.packed import can_pack
from l4core.ops.router import route
from l4core.plugin_api import ExpertKernel, ExpertWeights

SKIPPED = -1
"""Expert id of a token whose expert another rank holds."""


class Experts(nn.Module):
    """The routed experts. Shapes are the checkpoint's, in by out; in memory each expert lies out by in, the order in which a product of few
    rows, and any product in bfloat16 on a CPU, reads a weight fastest."""

    format = "plain"

    def __init__(self, num_experts: int, hidden: int, inter: int) -> None:
        super().__init__()
        self.gate_up = parameter(num_experts, hidden, 2 * inter, transposed=True)  # gate columns first
        self.down = parameter(num_experts, inter, hidden, transposed=True)

    def matrices(self) -> tuple[tuple[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]]:
        """(gate_up, its scale), (down, its scale) as kernels read them."""
        return (self.gate_up.transpose(1, 2), None), (self.down.transpose(1, 2), None)


class MoE(nn.Module):
    """out = shared(x) + expert_e(s · x), e the arg-max of the router's logits, s = sigmoid of that logit in float32. Because the expert is
    nonlinear, s on its output would be another function.

    On one of several ranks the result is a summand: the router is whole, so all ranks choose alike, of the shared expert and of the routed ones that
    it holds (slicing.expert_share) a rank has a part, and for a token whose expert is elsewhere it adds the shared expert only.

    kernel: computes everything after the router; chosen once for the model (experts.select), torch's where none is given."""

    def __init__(
        self, config: ModelConfig, kernel: ExpertKernel | None = None, *, rank: int = 0, world: int = 1, ep: int = 1
    ) -> None:
        """config: of the whole model.  rank: of `world`, in `ep` groups for the experts."""
        super().__init__()
        hidden, inter = config.hidden_size, config.intermediate_size
        self.router = Linear(config.num_experts, hidden)
        self.shared = SwiGLU(hidden, inter // world)
        self.held = expert_share(config.num_experts, rank, world, ep)
        self.experts = Experts(self.held.count, hidden, inter // self.held.world)
        self.kernel = kernel or TorchExperts()
        self.world = world
        self.packed: PackedExperts | None = None
        self.skips = True
        self._ready: ExpertWeights | None = None

    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor | None = None, score: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, H] → [T, H]; the result may be a transposed view. expert_ids, score: of `route`, where it was done with the norm."""
        if expert_ids is None or score is None:
            expert_ids, score = route(x, self.router.weight)
        if self.held.count < self.router.weight.shape[0]:
            expert_ids, score = self._held_here(expert_ids, score)
        if self.packed is not None:
            return self.packed(x, expert_ids, score)
        out = self.kernel.forward(x, expert_ids, score, self._ready or self.weights())
        return out if self.shared_in_kernel else out.add_(self.shared(x))

    def norm_route(
        self, stream: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Adds update [T, H] to the residual stream [T, H] in place; → what `forward` takes: the sum's RMS norm · weight [H], expert ids, score."""
        found = self.kernel.norm_route(stream, update, weight, eps, self.router.weight)
        return norm_route(stream, update, weight, eps, self.router.weight) if found is None else found

    def take_kernel(self, selected: SelectedExperts) -> None:
        """Use this kernel from now on."""
        self.kernel, self.skips = selected.kernel, selected.verdict.skips

    def _held_here(self, expert_ids: torch.Tensor, score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids as this rank counts its experts. Of one that is elsewhere −1; for a kernel that does not know that any id and a score of 0, with
        which an expert's result is 0."""
        here = expert_ids - self.held.first
        elsewhere = (here < 0) | (here >= self.held.count)
        if self.skips:
            return here.masked_fill_(elsewhere, SKIPPED), score
        return here.clamp_(0, self.held.count - 1), score.masked_fill(elsewhere, 0.0)

    @property
    def shared_in_kernel(self) -> bool:
        """True iff the kernel computes the shared expert too, which it does for one of the format and the width of the routed ones."""
        return self.shared.gate_up.format == self.experts.format and self.held.world == self.world

    def linears_of_kernel(self) -> tuple[Linear, ...]:
        """Parts whose weights the kernel reads, those of the shared expert in an order that may be its own."""
        if isinstance(self.kernel, TorchExperts):
            return ()
        return (self.router, self.shared.gate_up, self.shared.down) if self.shared_in_kernel else (self.router,)

    def pack(self) -> None:
        """Torch's experts on a CPU, loaded before: their weights go into the order a CPU reads fastest, and the plain ones are let go."""
        if self.packed is None and isinstance(self.kernel, TorchExperts) and can_pack(self.experts.down[0]):
            self.shared.gate_up.pack()
            self.shared.down.pack()
            self.packed = PackedExperts(self.weights())
            del self.experts
        elif self.packed is None and self.router.weight.is_cpu:  # a GPU's steps are captured and ask once
            self._ready = self.weights()

    @property
    def routed_bytes(self) -> int:
        """Of the routed experts' weights, in whatever order and format they are kept."""
        if self.packed is not None:
            return self.packed.nbytes
        return sum(t.nbytes for t in (*self.experts.parameters(), *self.experts.buffers()))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MoE:
        self._ready = None  # parameters are moved
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def weights(self) -> ExpertWeights:
        """This layer's weights as kernels read them."""
        (gate_up, gate_up_scale), (down, down_scale) = self.experts.matrices()
        shared = self.shared if self.shared_in_kernel else None
        return ExpertWeights(
            gate_up=gate_up,
            down=down,
            gate_up_scale=gate_up_scale,
            down_scale=down_scale,
            shared_gate_up=None if shared is None else shared.gate_up.weight,
            shared_down=None if shared is None else shared.down.weight,
            shared_gate_up_scale=None if shared is None else shared.gate_up.scale(),
            shared_down_scale=None if shared is None else shared.down.scale(),
        )
