"""Where the backend says it runs, and what it says otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from l4_triton.probe import probe
from l4_triton.tiles import ARCHITECTURES, MAX_PROGRAMS, partial_bytes, tiles_for
from l4core.plugin_api import AttentionRequirements, Tier, Unusable, Usable
from l4core.testing.platforms import fake_platform

SCOUT = AttentionRequirements(
    num_q_heads=40,
    num_kv_heads=8,
    head_dim=128,
    q_dtype="bfloat16",
    kv_dtype="bfloat16",
    chunk_size=8192,
    max_num_seqs=256,
    max_num_tokens=8192,
)
H100 = fake_platform("sm90", {"triton": "3.6.0"})


def refusal(platform=H100, **changes: object) -> Unusable:  # type: ignore[no-untyped-def]
    verdict = probe(platform, replace(SCOUT, **changes))
    assert isinstance(verdict, Unusable), verdict
    return verdict


@pytest.mark.parametrize("name", ["sm80", "sm89", "sm90", "sm100", "sm103", "sm120", "gfx942", "gfx950", "gfx1100"])
def test_tuned_on_every_device_that_triton_compiles_for(name: str) -> None:
    verdict = probe(fake_platform(name, {"triton": "3.6.0"}), SCOUT)
    assert isinstance(verdict, Usable)
    assert verdict.tier == Tier.TUNED
    assert (verdict.native_chunk, verdict.tree_mask, verdict.graph, verdict.empty_rows) == (True,) * 4
    assert verdict.page_sizes is None
    assert verdict.page_stride == "free"


def test_on_a_cpu_it_is_last_and_says_what_for() -> None:
    verdict = probe(fake_platform("cpu", {"triton": "3.6.0"}), SCOUT)
    assert isinstance(verdict, Usable)
    assert verdict.tier == Tier.REFERENCE
    assert not verdict.graph
    assert "TRITON_INTERPRET=1" in verdict.note


@pytest.mark.parametrize("name", ["xpu", "privateuse1"])
def test_other_devices_are_refused_by_name(name: str) -> None:
    assert "wanted one of sm80" in refusal(fake_platform(name, {"triton": "3.6.0"})).reason


def test_an_architecture_that_does_not_exist_yet_is_refused() -> None:
    assert "sm95" in refusal(replace(H100, arch="sm95")).reason


@pytest.mark.parametrize(("libraries", "found"), [({}, "not installed"), ({"triton": "3.5.1"}, "triton 3.5.1")])
def test_triton_absent_or_too_old(libraries: dict[str, str], found: str) -> None:
    verdict = refusal(fake_platform("sm90", libraries))
    assert found in verdict.reason
    assert "pip install" in verdict.fix


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"head_dim": 80}, "head_dim 80"),
        ({"q_dtype": "float64", "kv_dtype": "float64"}, "float64"),
        ({"kv_dtype": "float16"}, "KV is float16"),
        ({"kv_dtype": "float8_e5m2"}, "KV is float8_e5m2"),
        ({"num_q_heads": 41}, "41 query heads"),
    ],
)
def test_what_the_kernels_lack_is_refused_with_what_was_found(changes: dict[str, object], word: str) -> None:
    assert word in refusal(**changes).reason


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_memory_claimed_is_what_the_largest_device_would_take(arch: str) -> None:
    """Partial results for two programs a multiprocessor, 304 of them at most; nothing grows with batch or context."""
    platform = replace(H100, arch=arch, vendor="amd" if arch.startswith("gfx") else "nvidia")
    verdict = probe(platform, SCOUT)
    assert isinstance(verdict, Usable)
    tiles = tiles_for(arch, "bfloat16", 128, "bfloat16")
    assert tiles.programs_per_sm * 304 <= MAX_PROGRAMS
    assert verdict.workspace_bytes == partial_bytes(MAX_PROGRAMS, tiles.verify.block_m, 128) < 64 << 20
    larger = probe(platform, replace(SCOUT, max_num_seqs=4096, max_num_tokens=1 << 20))
    assert larger == verdict
