"""The Triton kernels of router and experts: equal to the definition, and compiled for every family of devices, within its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from l4core.testing.compiled import compile_cases

SCRIPT = Path(__file__).with_name("kernels_script.py")
KIB = 1024
SHARED_MEMORY = {"sm80": 163 * KIB, "sm90": 227 * KIB, "sm100": 227 * KIB, "gfx942": 64 * KIB}


def run(device: str, **environment: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), device],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return set(done.stdout.split())


CHECKS = {
    "few",
    "many",
    "float32_bits_do_not_depend_on_the_batch",
    "only_hit_experts_are_read",
    "sort",
    "router",
    "router_ties",
}


def test_the_kernels_compute_the_definition() -> None:
    assert run("cpu", TRITON_INTERPRET="1") == CHECKS


@pytest.mark.gpu
def test_the_kernels_compute_the_definition_on_a_device() -> None:
    assert run("cuda") == CHECKS


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_the_kernels_compile_and_fit(arch: str) -> None:
    cases = compile_cases("l4core.testing.compile_experts", arch)
    assert {case.outcome for case in cases} == {"passed"}, cases[-1]
    shared = [int(case.reason.split("shared ")[1].split(",")[0]) for case in cases]
    assert len(shared) >= 12
    assert max(shared) <= SHARED_MEMORY[arch]
