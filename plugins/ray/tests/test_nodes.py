"""`l4-ray serve` over a Ray cluster of two nodes with addresses of their own (network namespaces). Needs ray and root: `make test-ray`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.machines import why_not
from l4core.testing.models.checkpoints import make_tiny_checkpoint
from l4core.testing.models.tokenizers import make_byte_tokenizer

pytest.importorskip("ray", reason="ray is not installed (make test-ray installs it)")

SCRIPT = Path(__file__).with_name("nodes_script.py")
TESTS = Path(__file__).parents[3] / "tests"


NO_ROOM = "import l4_ray.ranks as ranks; ranks.PLACE_SECONDS = 1; from l4_ray.cli import main; main()"


def test_a_cluster_without_room_is_named() -> None:
    command = [sys.executable, "-c", NO_ROOM, "serve", "DIR", "--tp", "1000"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 1
    assert "1000 GPU (the cluster has" in done.stderr


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_two_nodes_give_the_tokens_of_one_rank_and_come_back_from_every_death(tmp_path: Path) -> None:
    make_byte_tokenizer(tmp_path / "tokenizer")
    make_tiny_checkpoint(tmp_path / "tiny", tokenizer=tmp_path / "tokenizer")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", "")))}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "tiny")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    found = json.loads(lines[0].removeprefix("RESULT "))
    assert found["engines"] == [1, 1]
    assert found["same"]
    for death in ("engine of rank 1", "actor of rank 1", "actor of rank 0"):
        assert found[death]["same"], death
    assert (found["exit"], found["left"]) == (0, 0)
