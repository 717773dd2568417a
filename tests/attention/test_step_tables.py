"""The kernel of a step's tables and its torch twin agree. Under Triton's interpreter, in a process of its own, as in test_chunked_triton.py."""

from __future__ import annotations

from pathlib import Path

from helpers.kernel_script import run_script


def test_the_kernel_equals_its_twin() -> None:
    assert run_script(Path(__file__).with_name("step_tables_script.py")) == "120 cases"
