"""A model whose weights were put into the order a CPU reads fastest."""

from __future__ import annotations

import pytest
import torch

from l4core.ops.packed import can_pack
from model.harness import Harness


@pytest.mark.skipif(not can_pack(torch.empty(512, 512)), reason="this torch has no oneDNN for this processor")
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
