"""Steps of fixed shape without a GPU: the same tokens as batches planned tensor by tensor, in the simple loop and the overlapped one."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

from l4core.testing.models.eagle3 import make_tiny_draft


def test_the_tokens_of_a_padded_step_are_those_of_any_batch(tiny: Path) -> None:
    assert int(run("fixed_step_script.py", tiny)) > 60


def test_a_verification_with_padding_is_the_one_without(make_tiny, tmp_path: Path) -> None:
    """Row for row and slot for slot: chains of 1 to 3 guesses and none beside each other, over borders of chunks, guesses the host does not know."""
    folder = make_tiny(layers=4, hidden=64, heads=4, head_dim=16, inter=128, chunk=32, floor_scale=32)
    target = json.loads((folder / "config.json").read_text())
    met = ast.literal_eval(
        run("padded_step_script.py", folder, make_tiny_draft(tmp_path / "draft", target, aux_layers=[0, 1, 2]))
    )
    assert met["padded"] > 30
    assert met["late"] > 10
    assert met["over a border"] > 5
    assert met["without guesses"] > 10
    assert 0 < met["too short"] < 5


def run(script: str, *folders: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), *map(str, folders)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
