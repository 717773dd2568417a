"""Each hardware backend is a package of its own: its wheel, installed beside l4core's and nothing else of ours, is found and listed."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from helpers.packages import ROOT, build_wheel, environment_with

BACKENDS = {
    "fa3": "l4-fa3",
    "triton": "l4-triton",
    "trtllm_mha": "l4-trtllm-mha",
    "aiter": "l4-aiter",
    "intel_xpu": "l4-intel-xpu",
    "cpu": "l4-cpu",
}
BUILT_IN = {"reference", "sdpa"}


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("core"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_installs_alone_and_l4_backends_shows_it(core: Path, backend: str, tmp_path: Path) -> None:
    wheel = build_wheel(ROOT / "plugins" / backend, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert f"l4_{backend}/py.typed" in names
    assert not [name for name in names if name.startswith("tests")]
    python = environment_with([core, wheel], tmp_path / "venv")
    done = subprocess.run(
        [str(python.with_name("l4")), "backends", "--json"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    listed = {row["name"]: row for row in json.loads(done.stdout)["candidates"]}
    assert set(listed) == BUILT_IN | {backend}
    assert listed[backend]["distribution"] == BACKENDS[backend]
