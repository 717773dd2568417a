"""Which CPUs and models are taken, and what is said of the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from l4_cpu import build_kernels, l4_expert_kernels, probe
from l4_cpu.probe import probe_attention, probe_experts
from l4core.platform import CPU_INSTRUCTIONS
from l4core.plugin_api import AttentionRequirements, ExpertRequirements, ExpertsUsable, Platform, Tier, Unusable, Usable
from l4core.testing.platforms import FAKE_PLATFORMS, fake_platform

SCOUT = AttentionRequirements(
    num_q_heads=40, num_kv_heads=8, head_dim=128, q_dtype="bfloat16", kv_dtype="bfloat16", chunk_size=8192
)
EXPERTS = ExpertRequirements(
    num_experts=16, hidden_size=5120, intermediate_size=8192, dtype="bfloat16", max_num_tokens=64
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Platform:
    """A CPU with AVX2 and a package whose kernels are there."""
    monkeypatch.setattr(probe, "library", lambda name: build_kernels.library(name, tmp_path))
    for name in build_kernels.INSTRUCTIONS:
        build_kernels.library(name, tmp_path).touch()
    return replace(fake_platform("cpu", {}), runtime="avx2")


def test_core_knows_the_instruction_sets_that_are_built() -> None:
    assert set(CPU_INSTRUCTIONS) == set(build_kernels.INSTRUCTIONS)


@pytest.mark.parametrize("instructions", CPU_INSTRUCTIONS)
def test_tuned_on_every_cpu_with_one_of_them(machine: Platform, instructions: str) -> None:
    platform = replace(machine, runtime=instructions)
    attention, experts = probe_attention(platform, SCOUT), probe_experts(platform, EXPERTS)
    assert isinstance(attention, Usable)
    assert isinstance(experts, ExpertsUsable)
    assert attention.tier == experts.tier == Tier.TUNED
    assert attention.tree_mask
    assert experts.skips
    assert experts.workspace_bytes >= 64 * 2 * 8192 * 2


def test_other_devices_and_cpus_are_refused(machine: Platform) -> None:
    for name in FAKE_PLATFORMS:
        for verdict in (
            probe_attention(fake_platform(name, {}), SCOUT),
            probe_experts(fake_platform(name, {}), EXPERTS),
        ):
            assert isinstance(verdict, Unusable)
            assert (
                "wanted one of avx2" in verdict.reason or f"device {fake_platform(name).device_type}" in verdict.reason
            )


def test_without_its_kernels_it_says_how_to_build_them(machine: Platform) -> None:
    probe.library("avx2").unlink()
    verdict = probe_attention(machine, SCOUT)
    assert isinstance(verdict, Unusable)
    assert "no C++ compiler" in verdict.reason
    assert verdict.fix == "python -m l4_cpu.build_kernels"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"q_dtype": "float16", "kv_dtype": "float16"}, "float16"),
        ({"kv_dtype": "float8_e4m3fn"}, "KV is float8_e4m3fn"),
        ({"head_dim": 24}, "head_dim is 24"),
        ({"num_q_heads": 41}, "41 query heads"),
        ({"needs_tree": True, "num_draft_tokens": 64}, "65 nodes"),
        ({"needs_graph": True}, "graph"),
    ],
)
def test_attention_it_lacks(machine: Platform, changes: dict[str, object], word: str) -> None:
    verdict = probe_attention(machine, replace(SCOUT, **changes))  # type: ignore[arg-type]
    assert isinstance(verdict, Unusable)
    assert word in verdict.reason


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"dtype": "float64"}, "float64"),
        ({"weight_format": "int4_g128"}, "int4_g128"),
        ({"shared_format": "fp8_channel"}, "fp8_channel"),
        ({"intermediate_size": 1000}, "intermediate size is 1000"),
        ({"hidden_size": 24}, "hidden size is 24"),
        ({"needs_graph": True}, "graph"),
    ],
)
def test_experts_it_lacks(machine: Platform, changes: dict[str, object], word: str) -> None:
    (entry,) = l4_expert_kernels()
    verdict = entry.probe(machine, replace(EXPERTS, **changes))  # type: ignore[arg-type]
    assert isinstance(verdict, Unusable)
    assert word in verdict.reason
