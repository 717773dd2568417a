"""What a probe may answer, and what becomes of one that fails, lies or is of another version."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attention.entries import SMALL, make_entry
from l4core.attention.explain import RELEASED_LLAMA4
from l4core.attention.hints import FIRST_PARTY
from l4core.attention.select import candidates, select_backend
from l4core.plugin_api import PLUGIN_API, Tier, Unusable, Usable
from l4core.plugin_manager import load_plugins
from l4core.testing.platforms import fake_platform

OTHERS = ("l4-block-attention", *sorted({row.package for row in FIRST_PARTY}))
BUILTINS = load_plugins({"L4_DISABLE_PLUGINS": ",".join(OTHERS)})
CPU = fake_platform("cpu", {})


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (ValueError("ROCm version file not found"), "its probe raised ValueError: ROCm version file not found"),
        (SystemExit("bye"), "its probe raised SystemExit: bye"),
        (True, "its probe returned bool"),
        (Unusable(reason=""), "refused without a reason"),
        (Usable(tier=20), "tier is 20; wanted a Tier"),  # type: ignore[arg-type]
        (Usable(tier=Tier.TUNED, page_sizes=[16]), r"page_sizes is [16]"),  # type: ignore[arg-type]
        (Usable(tier=Tier.TUNED, page_sizes=()), r"page_sizes is ()"),
        (Usable(tier=Tier.TUNED, page_sizes=(0,)), r"page_sizes is (0,)"),
        (Usable(tier=Tier.TUNED, preferred_page_size=0), "preferred_page_size is 0"),
        (Usable(tier=Tier.TUNED, page_stride="any"), "page_stride is 'any'"),  # type: ignore[arg-type]
        (Usable(tier=Tier.TUNED, workspace_bytes=-1), "workspace_bytes is -1"),
        (Usable(tier=Tier.TUNED, workspace_bytes=1e6), "workspace_bytes is 1000000.0"),  # type: ignore[arg-type]
        (Usable(tier=Tier.NATIVE, page_sizes=(48,)), "page sizes 48: wanted a divisor of the attention chunk of 8192"),
    ],
)
def test_a_bad_probe_is_a_refusal_and_the_others_are_asked(verdict, reason: str) -> None:
    found = candidates([make_entry("bad", verdict), make_entry("good")], CPU, RELEASED_LLAMA4)
    assert [c.entry.name for c in found] == ["good", "bad"]
    assert [c.chosen for c in found] == [True, False]
    assert isinstance(found[1].verdict, Unusable)
    assert reason in found[1].verdict.reason


@pytest.mark.parametrize(
    ("api", "fix"),
    [
        (PLUGIN_API + 1, "pip install --upgrade l4core"),
        (PLUGIN_API + 7, "pip install --upgrade l4core"),
        (PLUGIN_API - 2, "pip install --upgrade l4-stale"),
    ],
)
def test_another_api_is_unusable_and_its_probe_is_not_called(api: int, fix: str) -> None:
    stale = make_entry("stale", AssertionError("called"), api=api)
    (found,) = candidates([stale], CPU, RELEASED_LLAMA4)
    assert isinstance(found.verdict, Unusable)
    assert found.verdict.reason.startswith(f"l4-stale 1.2 is written for plugin API {api}")
    assert found.verdict.fix == fix


@pytest.mark.parametrize(
    ("asked", "declared", "fix"),
    [
        ({"needs_graph": True}, {"graph": True}, "--disable-cuda-graph"),
        ({"needs_tree": True}, {"tree_mask": True}, "--speculative-eagle-topk 1"),
        ({"page_size": 256}, {"page_sizes": (64, 256)}, "--page-size 64"),
    ],
)
def test_what_is_needed_and_not_declared_is_refused(asked, declared, fix: str) -> None:
    req = replace(RELEASED_LLAMA4, **asked)
    has = make_entry("has", Usable(tier=Tier.PORTABLE, **declared))
    lacks = make_entry("lacks", Usable(tier=Tier.NATIVE, page_sizes=(64,)))
    found = candidates([lacks, has], CPU, req)
    assert [c.entry.name for c in found] == ["has", "lacks"]
    assert isinstance(found[1].verdict, Unusable)
    assert found[1].verdict.fix == fix


@pytest.mark.parametrize(
    ("name", "asked", "reason"),
    [
        ("sdpa", {"needs_tree": True}, "tree"),
        *((name, {"kv_dtype": "float4_e2m1fn_x2"}, "KV is float4_e2m1fn_x2") for name in ("sdpa", "reference")),
        *((name, {"needs_graph": True}, "graph") for name in ("sdpa", "reference")),
        *((name, {"q_dtype": "float8_e4m3fn"}, "queries are float8_e4m3fn") for name in ("sdpa", "reference")),
        *((name, {"num_q_heads": 7}, "7 query heads on 8 KV heads") for name in ("sdpa", "reference")),
    ],
)
def test_builtins_refuse_with_reasons(name: str, asked, reason: str) -> None:
    probe = next(p.entry.probe for p in BUILTINS.attention_backends if p.entry.name == name)
    assert isinstance(probe(CPU, RELEASED_LLAMA4), Usable)
    verdict = probe(CPU, replace(RELEASED_LLAMA4, **asked))
    assert isinstance(verdict, Unusable)
    assert reason in verdict.reason


def test_only_the_reference_does_float64() -> None:
    req = replace(SMALL, q_dtype="float64", kv_dtype="float64")
    assert select_backend(BUILTINS, CPU, req, device="cpu").entry.name == "reference"
