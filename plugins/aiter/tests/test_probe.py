"""Where the backend says yes, and that every lack is a refusal with what was found, what was wanted and a way out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from l4_aiter.probe import probe, workspace_bytes
from l4core.attention.verdicts import hold_to
from l4core.plugin_api import AttentionRequirements, Tier, Unusable, Usable
from l4core.testing.conformance import ProbeConformance
from l4core.testing.platforms import FAKE_PLATFORMS, fake_platform

AITER = {"aiter": "0.1.20"}
SCOUT = AttentionRequirements(
    num_q_heads=40, num_kv_heads=8, head_dim=128, q_dtype="bfloat16", kv_dtype="bfloat16", chunk_size=8192
)


class TestProbe(ProbeConformance):
    plugin, backend = "l4_aiter", "aiter"
    libraries = AITER


@pytest.mark.parametrize("name", FAKE_PLATFORMS)
def test_only_gfx942_and_gfx950(name: str) -> None:
    verdict = probe(fake_platform(name, AITER), SCOUT)
    if name in ("gfx942", "gfx950"):
        assert isinstance(verdict, Usable)
        assert (verdict.tier, verdict.provider, verdict.graph) == (Tier.NATIVE, "aiter 0.1.20", True)
    else:
        assert isinstance(verdict, Unusable)
        assert "wanted an AMD Instinct GPU of architecture gfx942 or gfx950" in verdict.reason


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, "found no aiter; wanted 0.1.7 or later"), ("0.1.6", "found aiter 0.1.6; wanted 0.1.7 or later")],
)
def test_absent_or_too_old(version: str | None, words: str) -> None:
    verdict = probe(fake_platform("gfx942", {"aiter": version} if version else {}), SCOUT)
    assert isinstance(verdict, Unusable)
    assert verdict.reason == words
    assert "github.com/ROCm/aiter" in verdict.fix


@pytest.mark.parametrize("version", ["0.1.7.post2.dev18", "0.1.7", "0.1.20", "0.1.20.post1+gabc", "1.0"])
def test_versions_that_are_taken(version: str) -> None:
    verdict = probe(fake_platform("gfx950", {"aiter": version}), SCOUT)
    assert isinstance(verdict, Usable)
    assert verdict.provider == f"aiter {version}"


def test_a_build_without_version_is_left_to_create() -> None:
    verdict = probe(fake_platform("gfx950", {"aiter": "0"}), SCOUT)
    assert isinstance(verdict, Usable)
    assert verdict.provider == "aiter, version unknown"


@pytest.mark.parametrize(
    ("arch", "kv_dtype", "taken"),
    [
        ("gfx942", "float8_e4m3fnuz", True),
        ("gfx942", "float8_e4m3fn", False),
        ("gfx950", "float8_e4m3fn", True),
        ("gfx950", "float8_e4m3fnuz", False),
        ("gfx942", "float8_e5m2", False),
        ("gfx950", "bfloat16", True),
    ],
)
def test_the_fp8_format_goes_by_architecture(arch: str, kv_dtype: str, taken: bool) -> None:
    verdict = probe(fake_platform(arch, AITER), replace(SCOUT, kv_dtype=kv_dtype))
    assert isinstance(verdict, Usable) is taken
    if isinstance(verdict, Unusable):
        assert verdict.reason.startswith(f"KV is {kv_dtype}; wanted bfloat16 or, on {arch}, float8_e4m3fn")
        assert verdict.fix == "--kv-cache-dtype auto"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q_dtype": "float32", "kv_dtype": "float32"}, "queries are float32; wanted bfloat16 or float16"),
        ({"kv_dtype": "float16"}, "KV is float16"),
        ({"head_dim": 24}, "head_dim is 24; wanted a multiple of 16 from 32 to 256"),
        ({"head_dim": 40}, "head_dim is 40"),
        ({"head_dim": 512}, "head_dim is 512"),
        ({"num_q_heads": 7, "num_kv_heads": 2}, "7 query heads on 2 KV heads"),
        ({"page_size": 16}, "page size is 16; wanted 64 or 128"),
        ({"page_size": 48}, "page size is 48"),
        ({"needs_tree": True, "num_draft_tokens": 7}, "one tree for the whole batch, and it gives no log-sum-exp"),
    ],
)
def test_every_lack_is_refused(changes: dict[str, object], words: str) -> None:
    verdict = probe(fake_platform("gfx942", AITER), replace(SCOUT, **changes))  # type: ignore[arg-type]
    assert isinstance(verdict, Unusable)
    assert words in verdict.reason
    assert verdict.fix or "head" in words


@pytest.mark.parametrize(
    "changes", [{"page_size": 128}, {"needs_graph": True}, {"num_draft_tokens": 7}, {"head_dim": 80}]
)
def test_what_is_claimed_is_granted(changes: dict[str, object]) -> None:
    asked = replace(SCOUT, **changes)  # type: ignore[arg-type]
    assert isinstance(hold_to(probe(fake_platform("gfx942", AITER), asked), asked), Usable)


def test_workspace_holds_the_least_split_of_a_full_batch_and_the_widest_of_one_row() -> None:
    few, many = workspace_bytes(SCOUT), workspace_bytes(replace(SCOUT, max_num_seqs=256, max_num_tokens=8192))
    assert few == 40 * 128 * 4 * 130 + 8
    assert many == 256 * 40 * 16 * 4 * 130 + 8
