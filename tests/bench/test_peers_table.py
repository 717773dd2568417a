"""The table of peers joins what engines wrote, and says which of them failed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "peers" / "table.py"


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PATH.parent)
        spec = importlib.util.spec_from_file_location("peers_table", PATH)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def ours(ms: float, **more: Any) -> dict[str, Any]:
    rows = [{"name": "decode bs 1 at 1024", "ms": ms, "floor_ms": 2.0, "experts": 1.0}]
    return {"engine": "l4", "label": "l4", "rows": rows, "ready_s": 20.0, "error": ""} | more


def test_the_better_time_of_ours_stands_beside_the_floor_and_the_peers(table: ModuleType) -> None:
    peer = {"engine": "vllm", "label": "vllm", "ready_s": None, "error": "exit 1: …", "rows": []}
    peer["rows"] = [{"name": "decode bs 1 at 1024", "ms": 3.0, "experts": 1.0}, {"name": "prefill 1x2048", "ms": 30.0}]
    start = {"engine": "start", "label": "start", "rows": [], "error": "", "cold": {"ready_s": 31.0}}
    runs = [ours(2.5), peer, ours(2.25, engine="l4-fa3"), ours(2.4), start]
    rows = table.join(runs)
    assert rows[0] == {
        "name": "decode bs 1 at 1024",
        "gpus": 1,
        "ms": {"l4": 2.4, "vllm": 3.0, "l4-fa3": 2.25},
        "floor": 2.0,
        "experts": {"l4": 1.0, "vllm": 1.0, "l4-fa3": 1.0},
    }
    assert rows[1]["ms"] == {"vllm": 30.0}
    shown = table.show({"rows": rows, "runs": runs})
    assert "| decode bs 1 at 1024 | 2.00 | 2.40 | 1.20 | 3.00 | 1.25 | 2.25 | 0.94 | 1.00, 1.00, 1.00 |" in shown
    assert "vllm: exit 1: …" in shown
    assert "L4 cold 31.0 s" in shown
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_runs_on_several_gpus_have_a_table_of_their_own(table: ModuleType) -> None:
    """The ranks' benchmark writes other keys; its rows join those of the peer."""
    wrote = {
        "1 GPU, decode 1": {"what": "decode 1", "ms": 2.5, "bytes_ms": 2.0, "experts": 1.0},
        "2 GPUs, nccl, decode 1": {"what": "decode 1", "ms": 1.5, "bytes_ms": 1.0, "experts": 1.0},
        "2 GPUs, nccl, prefill 8x2048": {"what": "prefill 8x2048", "ms": 80.0, "bytes_ms": 60.0},
        "nccl: decode 1": {"ms": 1.5, "efficiency": 0.8},
    }
    ranks = {**table.rows_of_ranks(wrote, 2), "engine": "l4-tp2", "label": "l4-tp2", "error": ""}
    peer = {"engine": "vllm-tp2", "label": "vllm-tp2", "error": ""}
    peer["rows"] = [{"name": "decode bs 1 at 1024", "ms": 3.0}, {"name": "prefill 8x2048", "ms": 88.0}]
    runs = [ours(2.4), ranks, peer]
    shown = table.show({"rows": table.join(runs), "runs": runs}).splitlines()
    assert "| decode bs 1 at 1024 | 2.00 | 2.40 | 1.20 | 1.00 |" in shown
    assert "| decode bs 1 at 1024 | 1.00 | 1.50 | 1.50 | 3.00 | 2.00 | 1.00, – |" in shown
    assert "| prefill 8x2048 | 60.00 | 80.00 | 1.33 | 88.00 | 1.10 | –, – |" in shown


@pytest.mark.parametrize(("layers", "skips"), [(8, False), (48, True)])
def test_a_whole_model_is_measured_on_the_ranks_only(
    table: ModuleType, tmp_path: Path, layers: int, skips: bool
) -> None:
    """One GPU does not hold it."""
    args = argparse.Namespace(layers=layers, l4_option=[], site=tmp_path, limit=1.0, logs=tmp_path)
    command, _ = table.Table(args, tmp_path)._command("l4-tp4", tmp_path / "out.json")
    assert ("--skip-one" in command) is skips


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_run_that_fails_or_hangs_is_a_line(table: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    ready, error = table.run("vllm", python("print('ready'); print('x'); exit(3)"), {}, log, 60)
    assert ready is not None
    assert error.startswith("exit 3: …ready x")
    _, error = table.run("vllm", python("import time; time.sleep(60)"), {}, log, 1)
    assert error == "took longer than 1 s"


def test_what_a_run_started_ends_with_it(table: ModuleType, tmp_path: Path) -> None:
    """A compiler's helper that holds the output open and would outlive the run: neither waited for nor left behind."""
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "print(p.pid, flush=True)"
    )
    log = tmp_path / "log"
    assert table.run("vllm", python(code), {}, log, 60) == (None, "")
    helper = Path("/proc") / log.read_text().strip()
    for _ in range(100):  # killed, but it may take a moment to go
        if not helper.exists() or helper.joinpath("stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the helper runs on")


def test_rows_measured_before_a_run_was_ended_are_kept(
    table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"name": "decode bs 1 at 1024", "ms": 3.0}
    code = f"import time, pathlib; pathlib.Path({str(tmp_path / 'l4.json')!r}).write_text({json.dumps({'rows': [row]})!r}); time.sleep(60)"
    monkeypatch.setattr(table.Table, "_command", lambda self, engine, out: (python(code), {}))
    monkeypatch.setitem(table.LIMIT_SECONDS, "l4", 3)
    args = argparse.Namespace(limit=100, logs=tmp_path, kit=None, runs="l4")
    found = table.Table(args, tmp_path).measure("l4")
    assert found["rows"] == [row]
    assert found["error"] == "took longer than 3 s"
    args.limit = 1
    assert table.Table(args, tmp_path).measure("l4")["error"] == "no time was left"
    assert table._read(tmp_path / "none.json") == {}
    (tmp_path / "half.json").write_text('{"rows": [')
    assert table._read(tmp_path / "half.json") == {}


def test_a_kit_is_unpacked_once_and_a_broken_one_is_named(table: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("x = 1")
    pack = ["bash", "-c", "tar cf - flash_attn_interface.py | xz > whole; split -n 2 -d whole vk."]
    subprocess.run(pack, cwd=tmp_path, check=True)
    args = argparse.Namespace(limit=100, logs=tmp_path, kit=tmp_path, site=tmp_path / "site", runs="vllm")
    runs = table.Table(args, tmp_path)
    assert runs._missing("vllm") == ""
    assert (args.site / "vllm" / "flash_attn_interface.py").is_file()
    (tmp_path / "vk.01").unlink()
    assert runs._missing("vllm") == "", "what was unpacked stays"
    args.site = tmp_path / "other"
    assert runs._missing("vllm").startswith("the kit could not be unpacked: ")
    assert runs._missing("l4-fa3").startswith("no tsfa3.tar.xz in ")


def test_plugins_are_found_where_nothing_is_installed(table: ModuleType, tmp_path: Path) -> None:
    from importlib.metadata import distributions

    found = {d.name: d.entry_points for d in distributions(path=[str(table.metadata(tmp_path))])}
    assert {"l4core", "l4-fa3", "l4-triton"} <= found.keys()
    assert all(found[name].select(group="l4core") for name in ("l4core", "l4-fa3", "l4-triton"))


def test_the_peers_config_is_scouts_with_fewer_layers(table: ModuleType) -> None:
    from l4core.model.config import ModelConfig

    config = ModelConfig.from_dict(table.scout(8))
    assert config.num_layers == 8
    assert config.rope_layers == (True, True, True, False) * 2
    assert all(config.moe_layers)
