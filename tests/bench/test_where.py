"""benchmarks/where.py: what every result says of where it was measured, and that every script that keeps a result says it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ELSEWHERE = {"conformance.py", "side_process.py", "sglang_side.py", "vllm_side.py", "make_model.py", "one.py"}
"""Scripts whose files another one reads and keeps, or the kit writes."""


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("where", BENCHMARKS / "where.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t")
    done = subprocess.run(["git", *identity, "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_result_says_date_commit_cpu_and_versions_and_no_path(module: ModuleType) -> None:
    found = module.where("cpu", "numpy", "no-such-package")
    assert list(found)[:3] == ["date", "commit", "cpu"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert re.fullmatch(r"\w+, \d+ cores(, \w+)*", found["cpu"])
    assert {"torch", "numpy"} < set(found)
    assert "no-such-package" not in found
    assert "/" not in json.dumps(found)


def test_the_commit_is_the_clones_and_says_whether_files_differ(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("L4_COMMIT", "told")
    assert module.commit(tmp_path) == "told"
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    assert module.commit(tmp_path) == git(tmp_path, "rev-parse", "--short", "HEAD")
    (tmp_path / "new").write_text("not of the clone")
    assert not module.commit(tmp_path).endswith("+")
    (tmp_path / "a").write_text("2")
    assert module.commit(tmp_path) == git(tmp_path, "rev-parse", "--short", "HEAD") + "+"


def test_the_card_is_the_drivers_word(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!{sys.executable}\nprint('NVIDIA H200\\nNVIDIA H200')\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.where()["card"] == "NVIDIA H200"
    assert "card" not in module.where("cpu")


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*/*.py")), ids=lambda path: path.name)
def test_a_script_that_keeps_a_result_says_where_it_is_from(path: Path) -> None:
    text = path.read_text()
    keeps = re.search(r"""add_argument\(\s*"(--json|--out|out)".*?type=Path""", text, re.DOTALL)
    if keeps and path.name not in ELSEWHERE:
        assert re.search(r"\bwhere\(", text), f"{path.name}: from where import where"
    assert not re.search(r"get_device_name|rev-parse|torch\.__version__|strftime\(\"%Y|date\.today", text), path.name
