"""Two replicas behind Ray Serve on this machine; killed under load, nothing that had not begun is lost. Needs ray: `make test-ray`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from l4core import LLM, SamplingParams
from l4core.testing.models.checkpoints import make_tiny_checkpoint
from l4core.testing.models.tokenizers import make_byte_tokenizer

pytest.importorskip("ray", reason="ray is not installed (make test-ray installs it)")

SCRIPT = Path(__file__).with_name("serve_script.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that no other process on this machine serves."""
    root = tmp_path_factory.mktemp("serve")
    make_byte_tokenizer(root / "tokenizer")
    make_tiny_checkpoint(root / "tiny", tokenizer=root / "tokenizer")
    return root / "tiny"


@pytest.fixture(scope="module")
def seen(checkpoint: Path) -> dict[str, Any]:
    return run(checkpoint)


def run(checkpoint: Path, *arguments: str) -> dict[str, Any]:
    """What the script saw, in a process of its own: Ray and Serve leave threads and warnings behind."""
    command = [sys.executable, str(SCRIPT), checkpoint.as_posix(), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    found: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return found


def test_every_route_passes_and_streams_come_in_pieces(seen: dict[str, Any]) -> None:
    assert seen["replicas"] == 2
    assert seen["answers"]["model"] == "tiny"
    assert seen["answers"]["refused"] == 400
    assert seen["answers"]["same"]
    assert seen["answers"]["pieces"] > 5


def test_nothing_that_had_not_begun_is_lost_when_a_replica_and_an_engine_are_killed(seen: dict[str, Any]) -> None:
    load = seen["load"]
    assert load["requests"] == 48
    assert load["lost_before_begun"] == []
    assert load["wrong"] == []
    assert set(load["lost_codes"]) <= {"replica_lost", "engine_dead"}, "what had begun is told, not cut off"
    assert load["both_back_s"] < 120


def test_a_client_that_hangs_up_frees_its_engine(seen: dict[str, Any]) -> None:
    assert 1 <= seen["hung_up"]["tokens"] < 150, "of 200"


def test_nothing_is_left_behind(seen: dict[str, Any]) -> None:
    assert seen["left"] == 0


def test_a_replica_may_have_its_ranks_on_several_nodes(checkpoint: Path) -> None:
    """It answers as one rank does, and when a rank dies Serve starts the replica anew."""
    found = run(checkpoint, "nodes")
    config = {"device": "cpu", "dtype": "float32", "context_length": 256}
    prompts = [[(number * 31 + i * 7) % 200 + 10 for i in range(20)] for number in range(8)]
    outputs = LLM(model=checkpoint.as_posix(), **config).generate(
        prompts, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    )
    assert found["replicas"] == 2, "two servers, one for each rank"
    assert found["texts"] == found["texts_after"] == [output.outputs[0].text for output in outputs]
    assert found["left"] == 0
