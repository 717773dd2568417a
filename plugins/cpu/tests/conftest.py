"""Tests of kernels need the library for this CPU: built by `pip install`, or by `python -m l4_cpu.build_kernels` in a source tree."""

from __future__ import annotations

import pytest

from l4_cpu.build_kernels import INSTRUCTIONS, library
from l4core.platform import CPU_INSTRUCTIONS, detect


@pytest.fixture(scope="session")
def built() -> str:
    """The name of the best instruction set here."""
    name = detect("cpu").runtime
    if name not in INSTRUCTIONS:
        pytest.skip(f"this CPU has none of {', '.join(INSTRUCTIONS)}")
    if not library(name).exists():
        pytest.skip("the kernels are not built: python -m l4_cpu.build_kernels")
    return name


@pytest.fixture(params=INSTRUCTIONS)
def each(request: pytest.FixtureRequest, built: str) -> str:
    """Every instruction set this CPU has."""
    name: str = request.param
    if not set(CPU_INSTRUCTIONS[name]) <= set(CPU_INSTRUCTIONS[built]):
        pytest.skip(f"this CPU has {built}")
    return name
