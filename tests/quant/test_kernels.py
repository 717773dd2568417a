"""The kernels for quantised weights: equal to the definition on the dequantised weights, relative errors stated in kernels_script.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.kernel_script import run_script
from l4core.errors import BackendUnavailable
from l4core.experts.quantised import TorchQuantisedExperts
from l4core.experts.select import SelectedExperts
from l4core.experts.smoke import prepare_experts
from l4core.plugin_api import ExpertKernel, ExpertsUsable, Tier
from l4core.quant.formats import FP8, INT4
from l4core.testing.compiled import compile_cases
from quant.expert_problem import make

SCRIPT = Path(__file__).with_name("kernels_script.py")


CHECKS = ["few", "many", "chosen_tiles", "rows_in_eight_bits", "linear_layers"]


def test_the_kernels_compute_the_definition() -> None:
    assert run_script(SCRIPT).split() == CHECKS


@pytest.mark.gpu
def test_the_kernels_compute_the_definition_on_a_device() -> None:
    assert run_script(SCRIPT, "cuda").split() == [*CHECKS, "rows"]


@pytest.mark.parametrize("kept", [FP8, INT4])
@pytest.mark.parametrize("shared", [False, True])
def test_torch_computes_the_definition(kept: str, shared: bool) -> None:
    problem = make(kept, [2, 0, 2, 1, 2], 4, hidden=192, shared=shared)
    assert problem.error(TorchQuantisedExperts(kept)) < 1e-6
    problem = make(kept, [2, 0, 2, 1, 2], 4, hidden=192, shared=shared, dtype=torch.bfloat16)
    assert problem.error(TorchQuantisedExperts(kept)) < 1.2e-2  # weights are rounded to bfloat16 too


class Vendor(ExpertKernel):
    """Not torch's by its class, so it is checked; error: added to what it gives."""

    def __init__(self, kept: str, error: float) -> None:
        self.twin, self.error = TorchQuantisedExperts(kept), error

    def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return self.twin.forward(x, *rest) + self.error


@pytest.mark.parametrize("kept", [FP8, INT4])
def test_the_smoke_check_takes_quantised_weights(kept: str) -> None:
    weights = make(kept, [0], 3, hidden=192).weights
    verdict = ExpertsUsable(tier=Tier.TUNED)
    right, wrong = (
        SelectedExperts(kernel=Vendor(kept, error), name="vendor", source="test 1", verdict=verdict) for error in (0, 9)
    )
    prepare_experts(right, [weights], kept, torch.float32)
    with pytest.raises(BackendUnavailable, match=r"'vendor'.* differs from torch's"):
        prepare_experts(wrong, [weights], kept, torch.float32)


@pytest.mark.parametrize("arch", ["sm90", "gfx942"])
def test_the_kernels_compile(arch: str) -> None:
    """8-bit kernels for the architectures that multiply e4m3 only."""
    cases = compile_cases("l4core.testing.compiled.quantised", arch)
    assert {case.outcome for case in cases} == {"passed"}, cases[-1]
    assert len(cases) == (9 if arch == "sm90" else 5)
