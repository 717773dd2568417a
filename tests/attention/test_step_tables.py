"""The kernel of a step's tables and its torch twin agree. Under Triton's interpreter, in a process of its own, as in test_chunked_triton.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_kernel_equals_its_twin() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("step_tables_script.py")), "cpu"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "120 cases"
