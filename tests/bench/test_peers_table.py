"""The table of peers joins what engines wrote, and says which of them failed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "peers" / "table.py"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers_table", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(ms: float) -> dict[str, Any]:
    rows = [{"name": "decode bs 1 at 1024", "ms": ms, "floor_ms": 2.0, "experts": 1.0}]
    return {"engine": "l4", "label": "L4", "rows": rows, "ready_s": 20.0}


def test_the_better_time_of_ours_stands_beside_the_floor_and_the_peer(table: ModuleType) -> None:
    peer = {"engine": "vllm", "label": "vllm", "ready_s": None, "error": "exit 1: …", "rows": []}
    peer["rows"] = [{"name": "decode bs 1 at 1024", "ms": 3.0, "experts": 1.0}, {"name": "prefill 1x2048", "ms": 30.0}]
    rows = table.join(ours(2.5), ours(2.4), [peer])
    assert rows[0] == {
        "name": "decode bs 1 at 1024",
        "l4": 2.4,
        "floor": 2.0,
        "experts": {"l4": 1.0, "vllm": 1.0},
        "vllm": 3.0,
    }
    assert (rows[1]["l4"], rows[1]["vllm"]) == (None, 30.0)
    shown = table.show({"rows": rows, "runs": [ours(2.5), peer]})
    assert "| decode bs 1 at 1024 | 2.00 | 2.40 | 1.20 | 3.00 | 1.25 | 1.00, 1.00 |" in shown
    assert "vllm: exit 1: …" in shown
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_an_engine_that_fails_or_hangs_is_a_line(
    table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(table.LIMIT_SECONDS, "vllm", 2)
    log = tmp_path / "log"
    ready, error = table.run("vllm", [sys.executable, "-c", "print('ready'); print('x'); exit(3)"], {}, log)
    assert ready is not None
    assert error.startswith("exit 3: …ready x")
    _, error = table.run("vllm", [sys.executable, "-c", "import time; time.sleep(60)"], {}, log)
    assert error.startswith("took too long")
    assert "no vk.00" in table.unpack(tmp_path, tmp_path / "site")


def test_plugins_are_found_where_nothing_is_installed(table: ModuleType, tmp_path: Path) -> None:
    from importlib.metadata import distributions

    found = {d.name: d.entry_points for d in distributions(path=[str(table.metadata(tmp_path))])}
    assert {"l4core", "l4-fa3", "l4-triton"} <= found.keys()
    assert all(len(points.select(group="l4core")) for points in found.values())


def test_the_peers_config_is_scouts_with_fewer_layers(table: ModuleType) -> None:
    from l4core.model.config import ModelConfig

    config = ModelConfig.from_dict(table.scout(8))
    assert config.num_layers == 8
    assert config.rope_layers == (True, True, True, False) * 2
    assert all(config.moe_layers)
