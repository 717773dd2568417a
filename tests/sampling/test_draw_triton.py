"""The kernels of the draw give the law's tokens. Under Triton's interpreter, in a process of its own, as in tests/attention/test_chunked_triton.py;
with a GPU also there, where the noise has the law's bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).with_name("draw_triton_script.py"))


def run(device: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", SCRIPT, device],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_the_kernels_draw_by_the_law() -> None:
    assert run("cpu", TRITON_INTERPRET="1") == "140 rows"


@pytest.mark.gpu
def test_the_kernels_draw_by_the_law_on_a_gpu() -> None:
    assert run("cuda") == "794 rows"
