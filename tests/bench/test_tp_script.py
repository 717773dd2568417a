"""The comparison of several GPUs with one, here of one rank: what its file holds is not measured again, and nothing is begun when its time is up."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import distributed as dist

PATH = Path(__file__).parents[2] / "benchmarks" / "gpu" / "tp.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PATH.parent)
        spec = importlib.util.spec_from_file_location("tp_script", PATH)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run(script: ModuleType, out: Path, **given: Any) -> dict[str, Any]:
    args = {"parts": "tokens", "requests": 3, "variants": "graphs", "seconds": 600.0, "json": out}
    script.Run(argparse.Namespace(**args | given), torch.device("cpu")).all()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_it_goes_on_from_its_file_and_begins_nothing_when_its_time_is_up(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert run(script, out)["tokens, graphs"] == "3 of 3 equal"
    assert "ready" in capsys.readouterr().out
    out.write_text(json.dumps({"ranks": 8, "tokens, graphs": "measured before"}))
    found = run(script, out, variants="graphs,eager", seconds=0.0)
    assert found["tokens, graphs"] == "measured before"
    said = capsys.readouterr().out
    assert "ready" not in said, "an engine was begun"
    assert "tokens, eager" not in found
    assert "not begun after 0 s" in said
