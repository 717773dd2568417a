"""The kernel and its torch twin write the same rows. On a machine without an accelerator the kernel runs under Triton's interpreter, in a
process of its own: the interpreter is chosen by an environment variable when a kernel's file is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("chunked_triton_script.py")


def test_the_kernel_equals_its_twin() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "cpu"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "160 cases"
