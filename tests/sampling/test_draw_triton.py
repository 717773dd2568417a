"""The kernels of the draw give the law's tokens. Under Triton's interpreter, in a process of its own, as in tests/attention/test_chunked_triton.py;
with a GPU also there, where the noise has the law's bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.kernel_script import run_script

SCRIPT = Path(__file__).with_name("draw_triton_script.py")


def test_the_kernels_draw_by_the_law() -> None:
    assert run_script(SCRIPT) == "140 rows"


@pytest.mark.gpu
def test_the_kernels_draw_by_the_law_on_a_gpu() -> None:
    assert run_script(SCRIPT, "cuda") == "794 rows"
