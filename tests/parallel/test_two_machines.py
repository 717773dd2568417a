"""One engine over two machines with addresses of their own (network namespaces). In `make test-all`: each takes a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.machines import why_not
from helpers.profile import FULL

pytestmark = [
    pytest.mark.skipif(not FULL, reason="a minute each: make test-all runs them"),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

SCRIPT = Path(__file__).with_name("two_machines_script.py")


@pytest.mark.parametrize(("by", "ranks"), [("torchrun", 2), ("options", 4)])
def test_two_machines_give_the_tokens_of_one_and_survive_a_killed_rank_and_a_cut_line(
    tiny: Path, by: str, ranks: int
) -> None:
    found = run(tiny, by, ranks)
    assert found["same"]
    for trouble in ("killed", "cut"):
        assert found[trouble]["same"], trouble
        assert found[trouble]["unhealthy_after_s"] > 0
    assert found["left"] == 0


def run(checkpoint: Path, by: str, ranks: int) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", ""))),
    }
    command = [sys.executable, str(SCRIPT), checkpoint.as_posix(), "--by", by, "--ranks", str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    found: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return found
