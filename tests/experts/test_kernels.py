"""The Triton kernels of router and experts: equal to the definition, and compiled for every family of devices, within its memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.kernel_script import run_script
from l4core.testing.compiled import compile_cases

SCRIPT = Path(__file__).with_name("kernels_script.py")
KIB = 1024
SHARED_MEMORY = {"sm80": 163 * KIB, "sm90": 227 * KIB, "sm100": 227 * KIB, "gfx942": 64 * KIB}


CHECKS = {
    "few",
    "one",
    "many",
    "blocks_of_every_size",
    "float32_bits_do_not_depend_on_the_batch",
    "only_hit_experts_are_read",
    "sort",
    "router",
    "router_ties",
}


def test_the_kernels_compute_the_definition() -> None:
    assert set(run_script(SCRIPT).split()) == CHECKS


@pytest.mark.gpu
def test_the_kernels_compute_the_definition_on_a_device() -> None:
    assert set(run_script(SCRIPT, "cuda").split()) == CHECKS


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_the_kernels_compile_and_fit(arch: str) -> None:
    cases = compile_cases("l4core.testing.compiled.experts", arch)
    assert {case.outcome for case in cases} == {"passed"}, cases[-1]
    shared = [int(case.reason.split("shared ")[1].split(",")[0]) for case in cases]
    assert len(shared) >= 12
    assert max(shared) <= SHARED_MEMORY[arch]
