"""The selection table of the design, with the real probes of the six hardware packages, on machines that need not exist."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from l4core.attention.explain import RELEASED_LLAMA4, explain
from l4core.attention.hints import FIRST_PARTY
from l4core.attention.select import candidates, select_backend
from l4core.errors import BackendUnavailable
from l4core.plugin_api import Tier, Unusable, Usable
from l4core.testing.platforms import FAKE_PLATFORMS, fake_platform
from plugins.first_party import FOLDERS, LIBRARIES, LIBRARY_OF, house, module_name

NATIVE = {
    "sm90": "fa3",
    "sm100": "trtllm_mha",
    "sm103": "trtllm_mha",
    "gfx942": "aiter",
    "gfx950": "aiter",
    "xpu": "intel_xpu",
}
TRITON = ("sm80", "sm89", "sm90", "sm100", "sm103", "sm120", "gfx942", "gfx950", "gfx1100")
TOO_OLD = dict.fromkeys(LIBRARIES, "0.0.1")


def expected(platform: str, libraries: dict[str, str]) -> str:
    native = NATIVE.get(platform, "")
    if native and LIBRARY_OF[native] in libraries:
        return native
    return "triton" if platform in TRITON and "triton" in libraries else "sdpa"


@pytest.mark.parametrize("platform", FAKE_PLATFORMS)
@pytest.mark.parametrize("libraries", [LIBRARIES, {"triton": "3.7.1"}, {}], ids=["all", "triton", "none"])
def test_the_table(platform: str, libraries: dict[str, str]) -> None:
    assert explain(house(), fake_platform(platform, libraries)).json()["chosen"] == expected(platform, libraries)


@pytest.mark.parametrize("platform", FAKE_PLATFORMS)
def test_libraries_that_are_too_old_are_as_good_as_none(platform: str) -> None:
    found = explain(house(), fake_platform(platform, TOO_OLD))
    assert found.json()["chosen"] == "sdpa"
    native = NATIVE.get(platform)
    rows = [row for row in found.json()["candidates"] if row["name"] == native]
    assert all("0.0.1" in row["reason"] and row["fix"] for row in rows), rows


@pytest.mark.parametrize("platform", NATIVE)
def test_only_the_native_library_too_old(platform: str) -> None:
    library = LIBRARY_OF[NATIVE[platform]]
    assert explain(house(), fake_platform(platform, LIBRARIES | {library: "0.0.1"})).json()["chosen"] == (
        "triton" if platform in TRITON else "sdpa"
    )


@pytest.mark.parametrize("row", FIRST_PARTY, ids=lambda row: f"{row.package}-{row.vendor}")
def test_a_missing_package_is_named_with_its_pip_command(row: Any) -> None:
    """SM90 without l4-fa3 runs on triton, with a line that says what would serve it better."""
    name = {"amd": "gfx1100", "intel": "xpu", "cpu": "cpu"}.get(row.vendor, "sm89")
    if row.archs and row.vendor != "cpu":
        name = row.archs[0]
    platform = fake_platform(name, LIBRARIES)
    found = explain(house(without=[row.package]), platform)
    assert found.hint == f"{row.package} is made for {platform.arch}: pip install {row.package}"
    assert found.json()["chosen"] == ("triton" if name in TRITON and row.archs else "sdpa")
    assert explain(house(), platform).hint == ""


def test_fa3_off_hopper_is_used_only_when_named() -> None:
    platform = fake_platform("sm89", {"sgl_kernel": "0.4.10", "triton": "3.7.1"})
    entries = house().attention_backends
    by_itself = candidates(entries, platform, RELEASED_LLAMA4)
    (fa3,) = [c for c in by_itself if c.entry.name == "fa3"]
    assert isinstance(fa3.verdict, Usable)
    assert fa3.verdict.named_only
    assert [c.entry.name for c in by_itself if c.chosen] == ["triton"]
    named = candidates(entries, platform, RELEASED_LLAMA4, named="fa3")
    assert [c.entry.name for c in named if c.chosen] == ["fa3"]


@pytest.mark.parametrize(("platform", "name"), NATIVE.items())
def test_native_is_for_the_hardware_it_names(platform: str, name: str) -> None:
    for other in FAKE_PLATFORMS:
        (found,) = [
            c
            for c in candidates(house().attention_backends, fake_platform(other, LIBRARIES), RELEASED_LLAMA4)
            if c.entry.name == name
        ]
        is_native = isinstance(found.verdict, Usable) and found.verdict.tier == Tier.NATIVE
        assert is_native == (NATIVE.get(other) == name), other


# ---------------------------------------------------------------- what a backend lacks

ASKED: dict[str, dict[str, Any]] = {
    "tree": {"needs_tree": True, "num_draft_tokens": 7},
    "tree of 65 nodes": {"needs_tree": True, "num_draft_tokens": 64},
    "graph": {"needs_graph": True},
    "KV e4m3fn": {"kv_dtype": "float8_e4m3fn"},
    "KV e4m3fnuz": {"kv_dtype": "float8_e4m3fnuz"},
    "KV e5m2": {"kv_dtype": "float8_e5m2"},
    "float32": {"q_dtype": "float32", "kv_dtype": "float32"},
    "KV of another float": {"q_dtype": "float16"},
    "page 1": {"page_size": 1},
    "page 16": {"page_size": 16},
    "page 48": {"page_size": 48, "chunk_size": 96},
    "page 128": {"page_size": 128},
    "page 256": {"page_size": 256},
    "head_dim 24": {"head_dim": 24},
    "head_dim 64": {"head_dim": 64},
    "head_dim 80": {"head_dim": 80},
    "head_dim 256": {"head_dim": 256},
    "7 heads on 3": {"num_q_heads": 7, "num_kv_heads": 3},
    "20 heads on 1": {"num_q_heads": 20, "num_kv_heads": 1},
}
ALWAYS = {"tree of 65 nodes", "7 heads on 3"}
VENDOR = ALWAYS | {"float32", "KV e5m2", "KV of another float", "head_dim 24", "page 256", "page 48"}
LACKS = {
    ("trtllm_mha", "sm100"): VENDOR
    | {"KV e4m3fnuz", "page 1", "page 128", "head_dim 64", "head_dim 80", "head_dim 256"},
    ("trtllm_mha", "sm90"): VENDOR | {"tree", "KV e4m3fnuz", "page 1", "head_dim 80", "head_dim 256"},
    ("fa3", "sm90"): VENDOR | {"KV e4m3fnuz", "head_dim 80", "page 128"},
    ("aiter", "gfx942"): VENDOR | {"tree", "KV e4m3fn", "page 1", "page 16"},
    ("aiter", "gfx950"): VENDOR | {"tree", "KV e4m3fnuz", "page 1", "page 16"},
    ("intel_xpu", "xpu"): VENDOR
    | {"tree", "graph", "KV e4m3fnuz", "page 1", "page 16", "head_dim 80", "20 heads on 1"},
    ("triton", "sm90"): ALWAYS | {"KV e4m3fnuz", "KV e5m2", "KV of another float", "head_dim 24", "head_dim 80"},
    ("sdpa", "cpu"): ALWAYS | {"tree", "graph"},
    ("reference", "cpu"): ALWAYS | {"graph"},
}
"""What each refuses, of ASKED. Whoever learns a capability removes it here."""


@pytest.mark.parametrize(("name", "platform"), LACKS, ids=lambda x: x)
def test_what_is_lacking_is_refused_with_its_reason(name: str, platform: str) -> None:
    """By the probe or by what it did not declare; and a start that names the backend ends with that reason, before anything is created."""
    plugins, machine = house(), fake_platform(platform, LIBRARIES)
    refused = set()
    for what, changes in ASKED.items():
        req = replace(RELEASED_LLAMA4, **changes)
        (verdict,) = [c.verdict for c in candidates(plugins.attention_backends, machine, req) if c.entry.name == name]
        if isinstance(verdict, Unusable):
            refused.add(what)
            with pytest.raises(BackendUnavailable) as caught:
                select_backend(plugins, machine, req, device="cpu", named=name)
            assert verdict.reason in caught.value.message
            assert any(str(value) in verdict.reason or key == "needs_graph" for key, value in changes.items()) or (
                "tree" in verdict.reason
            ), f"{what}: {verdict.reason!r} does not say what was found"
    assert refused == LACKS[name, platform]


# ---------------------------------------------------------------- light, and on the command line


@pytest.mark.parametrize("package", FOLDERS)
def test_importing_a_package_and_probing_loads_nothing_heavy(package: str, run_python: Any) -> None:
    code = f"""
        import sys
        from plugins.first_party import LIBRARIES, house
        plugins = house(without=[p for p in {list(FOLDERS)!r} if p != {package!r}])
        from l4core.testing.platforms import FAKE_PLATFORMS, fake_platform, requirement_grid
        mine = [p for p in plugins.attention_backends if p.distribution == {package!r}]
        for name in FAKE_PLATFORMS:
            for libraries in (LIBRARIES, {{}}):
                mine[0].entry.probe(fake_platform(name, libraries), next(requirement_grid()))
        assert {module_name(package)!r} in sys.modules
        print([name for name in ("torch", "triton", "numpy") if name in sys.modules])
    """
    assert run_python(code).strip() == "[]"


def test_the_command_line_tells_it() -> None:
    """`l4 backends --platform sm100 --with flashinfer==0.7.2`, as the design has it: the text and the JSON."""
    from packaging.version import Version

    found = explain(house(), fake_platform("sm100", {"flashinfer": Version("0.7.2")}))
    assert "✓ trtllm_mha" in found.text()
    assert "flashinfer 0.7.2" in found.text()
    rows = {row["name"]: row for row in json.loads(json.dumps(found.json()))["candidates"]}
    assert rows["triton"]["reason"] == "triton is not installed"
    assert "sm100" in rows["aiter"]["reason"]


def test_the_command_itself(run_python: Any) -> None:
    """With what is installed: l4-trtllm-mha is chosen where it is, else a package that would serve better is named."""
    out = run_python(
        """
        from l4core.cli import main
        main(["backends", "--platform", "sm100", "--with", "flashinfer==0.7.2"])
        """
    )
    assert "✓ trtllm_mha" in out or "hint: l4-trtllm-mha is made for sm100: pip install l4-trtllm-mha" in out
