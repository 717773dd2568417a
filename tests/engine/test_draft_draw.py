"""The kernels of a draft's draw give the law's guesses, under Triton's interpreter (in a process of its own) and, with a GPU, there."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.kernel_script import run_script

SCRIPT = Path(__file__).with_name("draft_draw_script.py")


def test_the_kernels_draw_the_drafts_guesses() -> None:
    assert run_script(SCRIPT) == "52 rows"


@pytest.mark.gpu
def test_the_kernels_draw_the_drafts_guesses_on_a_gpu() -> None:
    assert run_script(SCRIPT, "cuda") == "52 rows"
