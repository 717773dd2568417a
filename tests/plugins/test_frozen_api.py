"""Plugins that were built for a past (or this) plugin API and are kept as wheels, never edited: each is found, selected and passes its kit.

A new PLUGIN_API adds a wheel and a line here; the old one stays for as long as the core serves its number.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from helpers.packages import pip_install
from l4core import plugin_compat
from l4core.plugin_api import PLUGIN_API

WHEELS = Path(__file__).parents[1] / "data" / "wheels"
FROZEN = {
    1: ("l4_first_api-1.0-py3-none-any.whl", "f4c4a67fe3484e431160f91909d68d3000f522354b8dd92ed60786a75108f60f"),
}
"""API → its wheel and the wheel's SHA-256."""
SERVED = [api for api in FROZEN if api in plugin_compat.served()]

KIT = """
from typing import ClassVar

from l4core.testing.conformance import ProbeConformance, QuickAttentionConformance


class TestProbe(ProbeConformance):
    plugin, backend = "l4_first_api", "first"


class TestAttention(QuickAttentionConformance):
    plugin, backend = "l4_first_api", "first"
    options: ClassVar = {"block_tokens": "48"}
"""


def test_every_api_so_far_has_its_wheel() -> None:
    assert list(FROZEN) == list(range(1, PLUGIN_API + 1))


@pytest.mark.parametrize("api", FROZEN)
def test_a_frozen_wheel_is_not_edited(api: int) -> None:
    name, digest = FROZEN[api]
    assert hashlib.sha256((WHEELS / name).read_bytes()).hexdigest() == digest


@pytest.fixture(scope="module", params=SERVED, ids=lambda api: f"API {api}")
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("frozen")
    pip_install(target, WHEELS / FROZEN[request.param][0])
    return target


def test_it_is_found_and_selected(installed: Path, run_python: Any) -> None:
    code = """
        from l4core.attention.select import select_backend
        from l4core.platform import detect
        from l4core.plugin_api import AttentionRequirements
        from l4core.plugin_manager import load_plugins
        req = AttentionRequirements(
            num_q_heads=6, num_kv_heads=2, head_dim=16, q_dtype="float32", kv_dtype="float32", chunk_size=64,
            needs_tree=True, num_draft_tokens=7,
        )
        plugins = load_plugins({"L4_STRICT_PLUGINS": "1"})
        selected = select_backend(plugins, detect("cpu"), req, device="cpu", named="first", options={"block_tokens": "7"})
        print(selected.describe(), selected.page_size, selected.verdict.workspace_bytes)
    """
    assert run_python(code, installed).strip() == "first (l4-first-api 1.0) · plain torch · reference 32 0"


def test_it_passes_its_kit(installed: Path, run_python: Any, tmp_path: Path) -> None:
    tests = tmp_path / "test_conformance.py"
    tests.write_text(KIT)
    flags = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path), str(tests)]
    code = f"import pytest, sys; sys.exit(pytest.main({flags!r}))"
    out = run_python(code, installed)
    assert " passed" in out
    assert "failed" not in out


def test_a_core_two_versions_on_refuses_it_with_what_to_do() -> None:
    """The one module that knows: served N and N − 1, refused before."""
    assert plugin_compat.refusal(1, "l4-first-api", "1.0", current=2) is None
    refused = plugin_compat.refusal(1, "l4-first-api", "1.0", current=3)
    assert refused is not None
    assert "plugin API 1, older than this core serves; wanted 3 or 2" in refused.reason
    assert refused.fix == "pip install --upgrade l4-first-api"
