"""The same model on an accelerator, through the portable backend: float32 parity, no host sync, graph capture."""

from __future__ import annotations

import pytest
import torch

from l4core.testing.conformance.device import no_host_sync
from model.harness import Harness, meta_step, ours

pytestmark = pytest.mark.gpu


def device() -> str:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return found.type


@pytest.mark.parametrize("options", [{}, {"step": 2, "qk_norm": False, "scaled_rope": True}], ids=["plain", "other"])
@pytest.mark.parametrize("backend", ["padded", "reference"])
def test_float32_equals_transformers(small, options, backend: str) -> None:
    c = small(**options)
    harness = Harness(ours(c.hf, device=device()), backend, device=device())
    ids = c.prompt(150)
    pieces = [harness.prefill(ids[:100], 37), *(harness.step({0: [token]})[0] for token in ids[100:])]
    assert (torch.cat(pieces).cpu() - c.logits(150)).abs().max() <= 1e-4


def test_bfloat16_stays_near_float32(small) -> None:
    """Grouped products on the device. Routing may flip where margins are tiny, so the median is bounded."""
    c = small()
    out = Harness(ours(c.hf, torch.bfloat16, device=device()), "padded", device=device()).prefill(c.prompt(150))
    assert (out.cpu() - c.logits(150)).abs().median() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 7, 2], [1, 1, 1]], ids=["prefill", "decode"])
def test_a_step_never_waits_for_the_device(small, dtype: torch.dtype, counts: list[int]) -> None:
    model = ours(small().hf, dtype, device=device())
    meta_step(model, counts, device=device())  # tables are made on first use
    with no_host_sync(device()):
        meta_step(model, counts, device=device())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_decode_replays_with_other_lengths(small, dtype: torch.dtype) -> None:
    """Plan, forward and logits inside one graph; replayed for other tokens, positions, lengths and pages."""
    from model.harness import StaticDecode

    c = small()
    model = ours(c.hf, dtype, device=device())
    step = StaticDecode(model, num_seqs=3, device=device())
    step.fill(seed=0)
    for _ in range(2):
        step.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run()
    for seed in (1, 2):
        step.fill(seed)
        eager = step.run().clone()
        step.fill(seed)
        graph.replay()
        torch.testing.assert_close(
            captured,
            eager,
            rtol=1e-5 if dtype == torch.float32 else 2e-2,
            atol=1e-5 if dtype == torch.float32 else 5e-2,
        )
