"""The kernel and its torch twin write the same rows. On a machine without an accelerator the kernel runs under Triton's interpreter, in a
process of its own: the interpreter is chosen by an environment variable when a kernel's file is imported."""

from __future__ import annotations

from pathlib import Path

from helpers.kernel_script import run_script

SCRIPT = Path(__file__).with_name("chunked_triton_script.py")


def test_the_kernel_equals_its_twin() -> None:
    assert run_script(SCRIPT) == "160 cases"
