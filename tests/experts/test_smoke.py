"""The check of a kernel at start: right ones pass, and each way of being wrong is refused by the kernel's name."""

from __future__ import annotations

import pytest
import torch

from experts.problem import make
from l4core.errors import BackendUnavailable
from l4core.experts.portable import TorchExperts
from l4core.experts.select import SelectedExperts
from l4core.experts.smoke import prepare_experts
from l4core.ops.norm_route import norm_route
from l4core.plugin_api import ExpertKernel, ExpertsUsable, ExpertWeights, Tier


class Changed(ExpertKernel):
    """Torch's kernel with one change to what goes in or comes out."""

    def __init__(self, change: str) -> None:
        self.change = change

    def prepare(self, weights: ExpertWeights) -> None:
        if self.change == "prepares":
            weights.down.copy_(weights.down.flip(1))

    def forward(
        self, x: torch.Tensor, expert_ids: torch.Tensor, score: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        if self.change == "raises":
            raise RuntimeError("no kernel image")
        if self.change == "unscaled":
            score = torch.ones_like(score)
        if self.change == "one expert for all":
            expert_ids = torch.zeros_like(expert_ids)
        out = TorchExperts().forward(x, expert_ids, score, weights)
        return {"wide": out.double(), "nan": out * torch.nan, "short": out[:-1], "prepares": out.flip(1)}.get(
            self.change, out
        )

    def norm_route(
        self, stream: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float, router: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        if self.change not in ("routes", "another expert", "keeps the stream", "no weight"):
            return None
        before = stream.clone()
        normed, expert_ids, score = norm_route(stream, update, weight, eps, router)
        if self.change == "another expert":
            expert_ids = (expert_ids + 1) % router.shape[0]
        if self.change == "keeps the stream":
            stream.copy_(before)
        return (normed / weight if self.change == "no weight" else normed), expert_ids, score


def check(change: str, dtype: torch.dtype = torch.float32) -> None:
    selected = SelectedExperts(
        kernel=Changed(change), name="mine", source="l4-mine 1.0", verdict=ExpertsUsable(tier=Tier.NATIVE)
    )
    prepare_experts(selected, [make([0], 3, dtype=dtype, seed=seed).weights for seed in range(2)], "plain", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["none", "routes"])
def test_a_right_kernel_passes(dtype: torch.dtype, change: str) -> None:
    check(change, dtype)


def test_a_kernel_that_reads_another_order_gets_it_before_it_is_asked() -> None:
    """This one wants the rows of the routed experts' down matrices the other way round, and turns its results back."""
    layers = [make([0], 3, shared=False, seed=seed).weights for seed in range(2)]
    before = [weights.down.clone() for weights in layers]
    verdict = ExpertsUsable(tier=Tier.NATIVE)
    selected = SelectedExperts(kernel=Changed("prepares"), name="mine", source="l4-mine 1.0", verdict=verdict)
    prepare_experts(selected, layers, "plain", torch.float32)
    assert all(weights.down.equal(old.flip(1)) for weights, old in zip(layers, before, strict=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("raises", "RuntimeError: no kernel image"),
        ("unscaled", "differs from torch's by"),
        ("one expert for all", "differs from torch's by"),
        ("nan", "differs from torch's by nan"),
        ("wide", "gave torch.float64"),
        ("short", "gave torch.float32"),
        ("another expert", "its norm or router differs from torch's by"),
        ("keeps the stream", "its norm or router differs from torch's by"),
        ("no weight", "its norm or router differs from torch's by"),
    ],
)
def test_a_wrong_kernel_is_refused_by_name(change: str, text: str) -> None:
    with pytest.raises(BackendUnavailable, match="expert kernel 'mine'") as caught:
        check(change)
    assert text in caught.value.message
    assert caught.value.fix == "--expert-kernel torch"
