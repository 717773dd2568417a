"""A model whose weights were put into the order a CPU reads fastest."""

from __future__ import annotations

import pytest
import torch

from l4core.experts.select import SelectedExperts
from l4core.model.moe import MoE
from l4core.ops.packed import can_pack
from l4core.plugin_api import ExpertKernel, ExpertsUsable, Tier
from model.harness import Harness

packs = pytest.mark.skipif(not can_pack(torch.empty(512, 512)), reason="this torch has no oneDNN for this processor")


class AKernel(ExpertKernel):
    """A plugin's, with an order of weights that core does not know."""

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.zeros_like(x)


@packs
def test_weights_that_a_plugins_kernel_reads_stay_as_they_are(case) -> None:
    model = case(inter=640).model()
    blocks = [module for module in model.modules() if isinstance(module, MoE)]
    for moe in blocks:
        verdict = ExpertsUsable(tier=Tier.TUNED)
        moe.take_kernel(SelectedExperts(kernel=AKernel(), name="a", source="test", verdict=verdict))
    model.pack()
    assert any(p.is_mkldnn for p in model.parameters())
    for moe in blocks:
        weights = moe.weights()
        for weight in (weights.gate_up, weights.down, weights.shared_gate_up, weights.shared_down):
            assert weight.layout == torch.strided


@packs
def test_a_packed_model_computes_what_it_did_and_keeps_no_second_copy(case) -> None:
    c = case(step=2, inter=640)
    model = c.model()
    before = sum(p.numel() for p in model.parameters())
    large = {name for name, p in model.named_parameters() if "experts" in name}
    assert large
    model.pack()
    plain = [p for p in model.parameters() if not p.is_mkldnn]
    assert not large & {name for name, _ in model.named_parameters()}
    assert sum(p.numel() for p in plain) < before / 5
    model.pack()  # a second time changes nothing
    harness = Harness(model, num_seqs=3)
    pieces = [harness.prefill(c.prompt(75), 33, seq) for seq in range(3)][0:1]
    for token in c.prompt(90)[75:85]:
        pieces.append(harness.step({0: [token], 1: [token], 2: [token]})[0])
    for token in c.prompt(90)[85:]:
        pieces.append(harness.step({0: [token]})[0])
    assert (torch.cat(pieces) - c.logits(90)).abs().max() <= 1e-4
