"""A draw over ranks that share the vocabulary gives the law's tokens: the torch twin, the kernels (under Triton's interpreter, on a GPU where there
is one)."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.kernel_script import run_script

SCRIPT = Path(__file__).with_name("draw_shards_script.py")


def test_ranks_draw_by_the_law() -> None:
    assert run_script(SCRIPT) == "60 rows"


@pytest.mark.gpu
def test_ranks_draw_by_the_law_on_a_gpu() -> None:
    assert run_script(SCRIPT, "cuda") == "794 rows"
