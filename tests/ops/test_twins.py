"""Core's Triton kernels: equal to their torch twins, and compiled for every family of devices.

Without an accelerator the kernels run under Triton's interpreter, in a process of their own: it is chosen by an environment variable when a kernel's
file is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.kernel_script import run_script
from l4core.testing.compiled import ARCHITECTURES, compile_cases

SCRIPT = Path(__file__).with_name("twins_script.py")
CHECKS = "add_norm norm_route two_norms silu heads skinny large_weights fp8_bits"


def test_the_kernels_equal_their_twins() -> None:
    assert run_script(SCRIPT) == CHECKS


@pytest.mark.gpu
def test_the_kernels_equal_their_twins_on_a_device() -> None:
    assert run_script(SCRIPT, "cuda") == CHECKS


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernels_compile(arch: str) -> None:
    # Not while tests are collected: this imports Triton, compiled or interpreted for the whole process.
    from l4core.testing.compiled.ops import KERNELS

    cases = compile_cases("l4core.testing.compiled.ops", arch)
    launched = [kernel for kernel in KERNELS if not kernel.archs or arch in kernel.archs]
    assert [case.outcome for case in cases] == ["passed"] * len(launched), cases[-1]
