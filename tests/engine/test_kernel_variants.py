"""A kernel that is compiled while requests wait is the worst latency there is: what has been seen of short prompts must do for long ones."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None or importlib.util.find_spec("l4_triton") is None:
    pytest.skip("triton or l4-triton is not installed", allow_module_level=True)
# Not imported here: the first import of Triton in a process decides whether its interpreter is used, and other tests want it.


def test_what_was_rehearsed_is_all_that_requests_launch() -> None:
    script = Path(__file__).with_name("kernel_variants_script.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "--prompts", "24576,65536", "--steps", "0"],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rehearsal, graphs, short, last = done.stdout.splitlines()
    assert int(rehearsal.split()[1]) > 40, "the script saw hardly any launch"
    assert "prefill_kernel 4" in rehearsal, (
        "wanted one for global layers and one for local ones, wherever a step's pieces begin, for few sequences and for many"
    )
    assert graphs == "graphs: 0 variants", "captured steps launch what was not rehearsed, so compiled ahead in vain"
    assert short.startswith("round 1")
    assert short.endswith(": 0 variants")
    assert last.startswith("round 2")
    assert last.endswith(": 0 variants")
